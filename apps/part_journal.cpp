#include "part_journal.h"

#include <filesystem>

#include "gemma_torch/base/atomic_file.h"

namespace gemma_torch::apps {
namespace {

std::string journal_path(const std::string& part) {
  return part + ".jsonl";
}

}  // namespace

void add_resume_flag(CLI::App& command, bool& resume) {
  command.add_flag("--resume",
                   resume,
                   "what is done stays, in OUT.part, when the command is stopped or killed: given "
                   "again, it goes on from there");
}

PartJournal::PartJournal(const std::string& file, const nlohmann::json& header)
    : part_(part_path(file)), rows_(journal_path(part_), header) {
  if (!rows_.found().empty() && std::filesystem::exists(part_)) {
    last_ = rows_.found().back();
  }
}

PartJournal::~PartJournal() {
  if (last_.is_null()) {
    std::error_code ignored;
    std::filesystem::remove(part_, ignored);
  }
}

void PartJournal::append(const nlohmann::json& row) {
  rows_.append(row);
  last_ = row;
}

void PartJournal::remove() {
  std::filesystem::remove(journal_path(part_));
}

}  // namespace gemma_torch::apps
