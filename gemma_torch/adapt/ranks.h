#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace gemma_torch {

/// A sum over ranks that is under way, of a tensor that lives as long.
class PendingSum {
 public:
  bool done();  // also moves on the others that are under way
  void wait();

 private:
  friend class Ranks;
  struct Request;
  std::shared_ptr<Request> request_;
};

/// The processes that train one model together. All of them make the same calls in the same order, on the thread that
/// joined; a process alone passes through every call. Tensors are contiguous and on the CPU.
/// Throws: Error `[ranks] ..` naming the call of MPI that failed.
class Ranks {
 public:
  Ranks() = default;  // alone
  /// All that mpirun started; begins to use MPI. Throws: Error where this build has none.
  static Ranks world();
  /// Ends the use of MPI, once all ranks are here.
  void leave() const;

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

  /// Sums of each value over the ranks, the same bits on all of them.
  void sum(std::vector<double>& values) const;
  /// Begins such a sum of float32 values, in place.
  PendingSum start_sum(const at::Tensor& values) const;
  /// Overwrites a tensor with rank 0's.
  void broadcast(const at::Tensor& tensor) const;
  /// Every rank's text, by rank.
  std::vector<std::string> gather(const std::string& own) const;
  /// Whether all ranks make this call within so many seconds. May be made while others wait in
  /// another one; never throws.
  bool all_here(double seconds) const;

 private:
  struct Meeting;  // where all_here() looks

  int64_t rank_ = 0, size_ = 1;
  std::shared_ptr<Meeting> meeting_;
};

}  // namespace gemma_torch
