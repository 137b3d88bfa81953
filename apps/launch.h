#pragma once

#include <exception>
#include <string>

#include "gemma_torch/adapt/ranks.h"

namespace gemma_torch::apps {

/// What is told of an exception, on one line.
std::string describe(const std::exception& error);

/// The ranks that mpirun started, which the first call joins; without mpirun this process alone.
/// Throws: Error where several were started and this build has no MPI, or another one.
const Ranks& join_ranks();

/// What every rank calls once its work is done.
void leave_ranks();

/// Tells of a failure and returns the code to exit with. On several ranks it does not return: where all fail alike
/// rank 0 tells, else the one that failed does; and all end.
int report(const std::string& message, int code);

}  // namespace gemma_torch::apps
