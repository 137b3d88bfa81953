#include "gemma_torch/adapt/training_data.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr size_t kLongestLine = size_t{64} << 20;
constexpr int64_t kChunk = int64_t{1} << 20;  // bytes read at a time

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

int64_t count(const std::vector<bool>& flags) {
  return std::count(flags.begin(), flags.end(), true);
}

}  // namespace

TrainingData::Descriptor::~Descriptor() {
  if (number >= 0) {
    ::close(number);
  }
}

TrainingData::TrainingData(std::string path,
                           const Tokenizer* tokenizer,
                           const ExampleOptions& options,
                           const ReadProgress& on_progress)
    : path_(std::move(path)), tokenizer_(tokenizer), options_(options) {
  check(options.max_tokens >= 2,
        "[training_data] max_tokens: expected at least 2, the first is not predicted, got {}",
        options.max_tokens);
  file_.number = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not wait
  check(file_.number >= 0, "[training_data] {}: {}", path_, std::strerror(errno));
  opened_ = state();
  scan(on_progress);
  check(left_out_ == 0 || !lines_.empty(),
        "[training_data] {}: expected targets among the first {} tokens of a line, got none in {}",
        path_,
        options_.max_tokens,
        left_out_);
  check(!lines_.empty(), "[training_data] {}: expected examples, the file is empty", path_);
}

TrainingData::FileState TrainingData::state() const {
  struct stat info = {};
  check(::fstat(file_.number, &info) == 0, "[training_data] {}: {}", path_, std::strerror(errno));
  check(S_ISREG(info.st_mode),
        "[training_data] {}: expected a regular file, got {}",
        path_,
        S_ISDIR(info.st_mode) ? "a folder" : "another kind");
  return {info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec};
}

void TrainingData::check_unchanged() const {
  check(state() == opened_,
        "[training_data] {}: expected the file as it was opened, it was written to since",
        path_);
}

// Bytes got, fewer than asked for only at the end of the file.
size_t TrainingData::read_at(int64_t offset, char* into, size_t bytes) const {
  size_t done = 0;
  while (done < bytes) {
    const auto got =
        ::pread(file_.number, into + done, bytes - done, offset + static_cast<int64_t>(done));
    if (got == 0) {
      break;
    }
    check(got > 0 || errno == EINTR, "[training_data] {}: {}", path_, std::strerror(errno));
    done += static_cast<size_t>(std::max<int64_t>(got, 0));
  }
  return done;
}

void TrainingData::scan(const ReadProgress& on_progress) {
  std::vector<char> buffer(static_cast<size_t>(kChunk));
  std::string line;
  int64_t offset = 0, number = 1;
  const auto take = [&] {
    add(line, offset, number++);
    offset += static_cast<int64_t>(line.size()) + 1;
    line.clear();
  };
  for (int64_t done = 0; done < opened_.bytes;) {
    const auto wanted = static_cast<size_t>(std::min(kChunk, opened_.bytes - done));
    std::string_view rest(buffer.data(), read_at(done, buffer.data(), wanted));
    check_unchanged();  // before a half-written line is called a faulty one
    while (!rest.empty()) {
      const auto end = rest.find('\n');
      line += rest.substr(0, end);
      check(line.size() <= kLongestLine,
            "[training_data] {}:{}: expected a line of at most {} bytes, got more",
            path_,
            number,
            kLongestLine);
      if (end == std::string_view::npos) {
        break;
      }
      take();
      rest.remove_prefix(end + 1);
    }
    done += static_cast<int64_t>(wanted);
    if (on_progress) {
      on_progress(done, opened_.bytes);
    }
  }
  if (!line.empty()) {
    take();
  }
}

void TrainingData::add(std::string_view line, int64_t offset, int64_t number) {
  if (is_blank(line)) {
    const bool last = offset + static_cast<int64_t>(line.size()) + 1 >= opened_.bytes;
    check(last, "[training_data] {}: expected an example, got a blank line", place(number));
    return;
  }
  const auto example = parse_example(line, place(number), tokenizer_, options_);
  const auto tokens = static_cast<int64_t>(example.ids.size());
  const auto targets = count(example.is_target);
  if (targets == 0) {
    ++left_out_;
    return;
  }
  lines_.push_back(
      {offset, number, static_cast<int32_t>(line.size()), static_cast<int32_t>(tokens)});
  fingerprint_.add(line);
  tokens_ += tokens;
  targets_ += targets;
  longest_ = std::max(longest_, tokens);
  truncated_ += example.truncated ? 1 : 0;
}

std::string TrainingData::place(int64_t number) const {
  return fmt::format("{}:{}", path_, number);
}

const TrainingData::Line& TrainingData::at(int64_t index) const {
  check(index >= 0 && index < size(),
        "[training_data] example: expected 0 to {}, got {} ({})",
        size() - 1,
        index,
        path_);
  return lines_[static_cast<size_t>(index)];
}

Example TrainingData::example(int64_t index) const {
  const auto& of = at(index);
  std::string line(static_cast<size_t>(of.bytes), '\0');
  line.resize(read_at(of.offset, line.data(), line.size()));
  check_unchanged();  // after reading: what was read is what was checked
  auto example = parse_example(line, place(of.number), tokenizer_, options_);
  check(static_cast<int64_t>(example.ids.size()) == of.tokens,  // times of writing are coarse
        "[training_data] {}: expected {} tokens as when the file was opened, got {}",
        place(of.number),
        of.tokens,
        example.ids.size());
  return example;
}

}  // namespace gemma_torch
