#include "results_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/io/file_bytes.h"
#include "gemma_torch/io/strict_json.h"

namespace gemma_torch::apps {
namespace {

constexpr int kJsonDepth = 8;

std::string line_of(const nlohmann::json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

void write_all(int descriptor, std::string_view text, const std::string& path) {
  while (!text.empty()) {
    const auto written = ::write(descriptor, text.data(), text.size());
    if (written < 0 && errno == EINTR) {
      continue;
    }
    check(written > 0, "[results] {}: {}", path, std::strerror(errno));
    text.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace

ResultsFile::ResultsFile(std::string path, const nlohmann::json& header)
    : path_(std::move(path)), file_(::open(path_.c_str(), O_RDWR | O_CREAT | O_APPEND, 0666)) {
  check(file_.get() >= 0, "[results] {}: {}", path_, std::strerror(errno));
  check(::flock(file_.get(), LOCK_EX | LOCK_NB) == 0,
        "[results] {}: another process is writing it",
        path_);
  const auto text = read_file(path_);
  const auto whole = text.rfind('\n') + 1;  // 0 where there is no line's end
  const auto first = line_of(header);
  if (whole == 0) {
    check(first.starts_with(text),
          "[results] {}: expected a new file or one of this command's, got \"{}\"",
          path_,
          printable(text));
  }
  size_t start = 0;
  for (size_t number = 0; start < whole; ++number) {
    const auto end = text.find('\n', start);
    const auto line = text.substr(start, end - start);
    number == 0 ? check_header(line, header)
                : found_.push_back(parse_strict_json(
                      line, kJsonDepth, fmt::format("{} line {}", path_, number + 1)));
    start = end + 1;
  }
  check(::ftruncate(file_.get(), static_cast<off_t>(whole)) == 0,
        "[results] {}: {}",
        path_,
        std::strerror(errno));
  if (whole == 0) {
    header_ = first;
  }
}

// Refused work would leave a header, and its correction be refused for that.
ResultsFile::~ResultsFile() {
  if (!header_.empty()) {
    ::unlink(path_.c_str());
  }
}

ResultsFile::Descriptor::~Descriptor() {
  if (value_ >= 0) {
    ::close(value_);
  }
}

void ResultsFile::check_header(const std::string& line, const nlohmann::json& header) const {
  const auto found = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  check(found.is_object() && found.contains("format") && found["format"] == header["format"],
        "[results] {}: expected a new file or one of this command's, got \"{}\"",
        path_,
        printable(line));
  for (const auto& [key, value] : header.items()) {
    const auto other = found.contains(key) ? found[key] : nlohmann::json();
    check(other == value,
          "[results] {}: {}: expected {}, the file has {}. Hint: the same flags, or another --out",
          path_,
          key,
          printable(value.dump()),
          printable(other.dump()));
  }
}

void ResultsFile::append(const nlohmann::json& row) {
  write_all(file_.get(), header_ + line_of(row), path_);
  header_.clear();
}

}  // namespace gemma_torch::apps
