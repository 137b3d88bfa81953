#include "gemma_torch/adapt/text_windows.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/error.h"
#include "gemma_torch/text/tokenizer.h"
#include "gemma_torch/text/utf8.h"

namespace gemma_torch {
namespace {

constexpr size_t kPiece = size_t{64} << 10;  // bytes encoded at a time, at least
constexpr size_t kLongestLine = size_t{64} << 20;

// Where `text` may be cut: after its last newline that another character follows, since runs of newlines may be one
// piece. 0: nowhere.
size_t cut_of(std::string_view text) {
  const auto last = text.find_last_not_of('\n');
  const auto newline =
      last == std::string_view::npos ? last : text.substr(0, last).find_last_of('\n');
  return newline == std::string_view::npos ? 0 : newline + 1;
}

class Windows {
 public:
  Windows(const Tokenizer& tokenizer, int64_t max_tokens, const std::string& out)
      : tokenizer_(tokenizer), max_tokens_(static_cast<size_t>(max_tokens)), file_(out) {
    ids_ = {tokenizer.bos_id()};
  }

  void add(std::string_view text) {
    for (const auto id : tokenizer_.encode(text, {.add_bos = false, .parse_special = false})) {
      ids_.push_back(id);
      if (ids_.size() == max_tokens_) {
        write();
      }
    }
  }

  void finish() {
    if (ids_.size() > 1) {
      write();
    }
    file_.commit();
  }

 private:
  void write() {
    const auto line = fmt::format("{{\"ids\": [{}]}}\n", fmt::join(ids_, ", "));
    file_.write(line.data(), line.size());
    ids_.resize(1);
  }

  const Tokenizer& tokenizer_;
  size_t max_tokens_;
  AtomicFile file_;
  std::vector<int64_t> ids_;
};

// Checks `text`, whose first line is number `line` of the file, and moves `line` past it.
void check_text(const std::string& path, std::string_view text, int64_t& line) {
  const auto valid = valid_utf8_prefix(text);
  const auto end = text.begin() + static_cast<std::ptrdiff_t>(valid);
  line += std::count(text.begin(), end, '\n');
  check(valid == text.size(),
        "[text] {}:{}: expected UTF-8, got byte {:#04x}",
        path,
        line,
        valid < text.size() ? static_cast<unsigned char>(text[valid]) : 0);
}

}  // namespace

void write_text_windows(const std::string& path,
                        const Tokenizer& tokenizer,
                        const std::string& out,
                        const WindowOptions& options) {
  check(options.max_tokens >= 2,
        "[text] max_tokens: expected at least 2, the first is <bos>, got {}",
        options.max_tokens);
  check(tokenizer.bos_id() >= 0, "[text] tokenizer: expected a vocabulary with <bos>");
  check(std::filesystem::is_regular_file(path), "[text] {}: expected a file, found none", path);
  std::ifstream file(path, std::ios::binary);
  check(file.is_open(), "[text] {}: cannot be read", path);
  const auto total = static_cast<int64_t>(std::filesystem::file_size(path));
  check(total > 0, "[text] {}: expected a text, the file is empty", path);
  Windows windows(tokenizer, options.max_tokens, out);
  std::string text;
  int64_t done = 0, line = 1;
  for (std::string piece(kPiece, '\0'); file;) {
    file.read(piece.data(), static_cast<std::streamsize>(piece.size()));
    text.append(piece, 0, static_cast<size_t>(file.gcount()));
    done += file.gcount();
    const auto cut = file ? cut_of(text) : text.size();
    check(text.size() - cut <= kLongestLine,
          "[text] {}:{}: expected a line of at most {} bytes, got more",
          path,
          line,
          kLongestLine);
    const auto whole = std::string_view(text).substr(0, cut);
    check_text(path, whole, line);
    windows.add(whole);
    text.erase(0, cut);
    if (options.on_progress) {
      options.on_progress(done, total);
    }
  }
  check(!file.bad(), "[text] {}: cannot be read", path);
  windows.finish();
}

}  // namespace gemma_torch
