#include "launch.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>

#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

constexpr double kPatience = 3;  // seconds in which ranks that fail alike do so

std::optional<Ranks> joined;

// How many processes a launcher says it started: Open MPI's, that of MPICH and its kin, MVAPICH's.
int64_t launched() {
  for (const auto* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}) {
    if (const auto* value = std::getenv(name); value != nullptr) {
      return std::atoll(value);
    }
  }
  return 1;
}

// For a failure before they were joined, such as a wrong flag.
Ranks ranks_or_alone() {
  try {
    return join_ranks();
  } catch (const Error&) {
    return {};
  }
}

}  // namespace

std::string describe(const std::exception& error) {
  std::string message = error.what();
  if (const auto* torch = dynamic_cast<const c10::Error*>(&error); torch != nullptr) {
    message = fmt::format("[torch] {}", torch->what_without_backtrace());
  } else if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    message = "[memory] not enough of it";
  }
  std::replace(message.begin(), message.end(), '\n', ' ');  // whatever a library says
  return message;
}

const Ranks& join_ranks() {
  if (!joined) {
    const auto started = launched();
    const auto ranks = started > 1 ? Ranks::world() : Ranks();
    check(ranks.size() == std::max<int64_t>(started, 1),
          "[ranks] expected the {} processes that were started, got {} from this build's MPI. "
          "Hint: the mpirun of the MPI it was built with",
          started,
          ranks.size());
    joined = ranks;
  }
  return *joined;
}

void leave_ranks() {
  if (joined && joined->size() > 1) {
    joined->leave();
  }
}

int report(const std::string& message, int code) {
  const auto ranks = ranks_or_alone();
  const bool alike = ranks.all_here(kPatience);
  if (!alike) {
    fmt::print(stderr, "gemma: error: rank {} of {}: {}\n", ranks.rank(), ranks.size(), message);
  } else if (ranks.rank() == 0) {
    fmt::print(stderr, "gemma: error: {}\n", message);
  }
  if (ranks.size() > 1) {
    // mpirun ends all when one has ended so: not before the message is out. No destructor may wait for the others.
    (void)(alike && ranks.all_here(kPatience));
    std::_Exit(code);
  }
  return code;
}

}  // namespace gemma_torch::apps
