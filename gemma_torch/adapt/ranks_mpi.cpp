#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "gemma_torch/adapt/ranks.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 30;  // MPI counts in int

void check_call(const char* call, int code) {
  if (code != MPI_SUCCESS) {
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    fail("[ranks] {}: {}", call, text);
  }
}

}  // namespace

struct PendingSum::Request {
  MPI_Request request = MPI_REQUEST_NULL;
};

struct Ranks::Meeting {
  MPI_Comm ranks = MPI_COMM_NULL;  // apart from calls that may be under way
};

bool PendingSum::done() {
  int flag = 1;
  if (request_) {
    check_call("MPI_Test", MPI_Test(&request_->request, &flag, MPI_STATUS_IGNORE));
  }
  return flag != 0;
}

void PendingSum::wait() {
  if (request_) {
    check_call("MPI_Wait", MPI_Wait(&request_->request, MPI_STATUS_IGNORE));
  }
}

Ranks Ranks::world() {
  int begun = 0;
  check_call("MPI_Initialized", MPI_Initialized(&begun));
  if (begun == 0) {
    int threads = MPI_THREAD_SINGLE;
    check_call("MPI_Init_thread", MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &threads));
    check(threads >= MPI_THREAD_FUNNELED,
          "[ranks] expected an MPI that allows a program to have threads, got one that does not");
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  int rank = 0, size = 1;
  check_call("MPI_Comm_rank", MPI_Comm_rank(MPI_COMM_WORLD, &rank));
  check_call("MPI_Comm_size", MPI_Comm_size(MPI_COMM_WORLD, &size));
  Ranks ranks;
  ranks.rank_ = rank;
  ranks.size_ = size;
  ranks.meeting_ = std::make_shared<Meeting>();
  check_call("MPI_Comm_dup", MPI_Comm_dup(MPI_COMM_WORLD, &ranks.meeting_->ranks));
  return ranks;
}

void Ranks::leave() const {
  int begun = 0, ended = 0;
  MPI_Initialized(&begun);
  MPI_Finalized(&ended);
  if (begun != 0 && ended == 0) {
    check_call("MPI_Finalize", MPI_Finalize());
  }
}

void Ranks::sum(std::vector<double>& values) const {
  if (size_ == 1) {
    return;
  }
  // Not MPI_Allreduce, which may round differently on each rank: what they decide by it must be the same.
  const auto n = static_cast<int>(values.size());
  auto sums = values;
  check_call("MPI_Reduce",
             MPI_Reduce(values.data(), sums.data(), n, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD));
  check_call("MPI_Bcast", MPI_Bcast(sums.data(), n, MPI_DOUBLE, 0, MPI_COMM_WORLD));
  values = sums;
}

PendingSum Ranks::start_sum(const at::Tensor& values) const {
  check(values.is_contiguous() && values.device().is_cpu() && values.scalar_type() == at::kFloat,
        "[ranks] sum: expected contiguous float32 on the CPU");
  PendingSum sum;
  if (size_ > 1) {
    sum.request_ = std::make_shared<PendingSum::Request>();
    check_call("MPI_Iallreduce",
               MPI_Iallreduce(MPI_IN_PLACE,
                              values.data_ptr<float>(),
                              static_cast<int>(values.numel()),
                              MPI_FLOAT,
                              MPI_SUM,
                              MPI_COMM_WORLD,
                              &sum.request_->request));
  }
  return sum;
}

void Ranks::broadcast(const at::Tensor& tensor) const {
  check(tensor.is_contiguous() && tensor.device().is_cpu(),
        "[ranks] broadcast: expected a contiguous tensor on the CPU");
  if (size_ == 1) {
    return;
  }
  auto* bytes = static_cast<char*>(tensor.data_ptr());
  const auto total = static_cast<int64_t>(tensor.nbytes());
  for (int64_t start = 0; start < total; start += kMostBytes) {
    const auto n = static_cast<int>(std::min(kMostBytes, total - start));
    check_call("MPI_Bcast", MPI_Bcast(bytes + start, n, MPI_BYTE, 0, MPI_COMM_WORLD));
  }
}

std::vector<std::string> Ranks::gather(const std::string& own) const {
  if (size_ == 1) {
    return {own};
  }
  const auto ranks = static_cast<size_t>(size_);
  const auto length = static_cast<int>(own.size());
  std::vector<int> lengths(ranks), starts(ranks, 0);
  check_call("MPI_Allgather",
             MPI_Allgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, MPI_COMM_WORLD));
  for (size_t r = 1; r < ranks; ++r) {
    starts[r] = starts[r - 1] + lengths[r - 1];
  }
  std::string all(static_cast<size_t>(starts.back() + lengths.back()), '\0');
  check_call("MPI_Allgatherv",
             MPI_Allgatherv(own.data(),
                            length,
                            MPI_CHAR,
                            all.data(),
                            lengths.data(),
                            starts.data(),
                            MPI_CHAR,
                            MPI_COMM_WORLD));
  std::vector<std::string> texts;
  for (size_t r = 0; r < ranks; ++r) {
    texts.push_back(all.substr(static_cast<size_t>(starts[r]), static_cast<size_t>(lengths[r])));
  }
  return texts;
}

bool Ranks::all_here(double seconds) const {
  if (size_ == 1) {
    return true;
  }
  MPI_Request request = MPI_REQUEST_NULL;
  int code = MPI_Ibarrier(meeting_->ranks, &request);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int here = 0;
  while (code == MPI_SUCCESS && here == 0 && std::chrono::steady_clock::now() < end) {
    code = MPI_Test(&request, &here, MPI_STATUS_IGNORE);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return code == MPI_SUCCESS && here != 0;
}

}  // namespace gemma_torch
