// The output head. top(k) scans all rows at few bytes, scores exactly only those that can be among the k best, with the
// very kernel of the full head, and so gives what the full head gives.

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/memory.h"
#include "gemma_torch/base/tensor_map.h"
#include "gemma_torch/engine/fused_top.h"

namespace gemma_torch {
namespace {

using kernels::Bf16;
using kernels::kBlockRows;
using kernels::Range;

// Blocks between two looks at their bounds: they fit the second cache, in which a batch's other rows find them, and are
// read in some microseconds, which is what a thread may wait for another at the end.
constexpr int64_t kScanPart = 32;

// Rows that may be among the best, for a thread to take at a time, and so few that they are scored without a second
// look at their bounds.
constexpr size_t kPiece = 256, kFewRows = 8;

// Blocks whose bounds a thread looks through at a time.
constexpr int64_t kDealt = 128;

}  // namespace

// final_norm of a row of hidden_.
void FusedEngine::normalize(int64_t row, float* to) const {
  const auto E = model_->cfg.emb_dim;
  kernel_.rms_norm(hidden_.data() + row * E,
                   pack_->final_norm(),
                   to,
                   E,
                   static_cast<float>(model_->cfg.rms_norm_eps));
}

void FusedEngine::normalize_last() {
  check(hidden_tokens_ > 0, "[logits] expected an append since the last reset or rewind, got none");
  if (!last_.empty()) {
    return;
  }
  const auto E = model_->cfg.emb_dim;
  last_.resize(static_cast<size_t>(batch() * E));
  for (int64_t b = 0; b < batch(); ++b) {
    normalize((b + 1) * hidden_tokens_ - 1, last_.data() + b * E);
  }
}

FusedEngine::TopState& FusedEngine::prepare_top(int64_t k) {
  const auto scan = pack_->scan();
  const auto blocks = scan.rows / kBlockRows;
  const auto threads = static_cast<size_t>(team_.size());
  if (top_ == nullptr) {
    top_ = std::make_unique<TopState>(team_);
    auto& s = *top_;
    for (int64_t b = 0; b < batch(); ++b) {
      s.inputs.emplace_back(1, model_->cfg.emb_dim);
      s.planes.emplace_back(static_cast<size_t>(2 * scan.plane_bytes()));
      s.bounds.push_back({.x = s.inputs.back().views()[0], .planes = s.planes.back().data()});
      s.block_upper.emplace_back(static_cast<size_t>(blocks));
    }
    s.upper = zeros_on_large_pages({batch(), scan.rows}, at::kFloat);
    s.permuted.assign(static_cast<size_t>(batch()),
                      std::vector<float>(static_cast<size_t>(model_->cfg.emb_dim)));
    s.likely.assign(threads, std::vector<Best>(static_cast<size_t>(batch())));
    s.most_scored = static_cast<size_t>(scan.rows / 4);
    s.most_pieces = scan.rows / static_cast<int64_t>(kPiece) + 1;
    s.threads.resize(threads);
    const auto share = static_cast<size_t>(blocks / team_.size() + kDealt);
    for (auto& thread : s.threads) {
      thread.blocks.resize(share + 16);
      thread.rows.resize((share + 1) * kBlockRows);
      thread.upper.resize(thread.rows.size());
    }
  }
  auto& s = *top_;
  s.k = k;
  // More than k rows, so that the k-th best of them is seldom far from the k-th best of all.
  s.likely_rows = static_cast<size_t>(k + k / 4 + 16);
  for (auto& of_rows : s.likely) {
    for (auto& best : of_rows) {
      best.restart(s.likely_rows);
    }
  }
  for (auto& thread : s.threads) {
    thread.rows.resize(std::max(thread.rows.size(), s.likely_rows));
    thread.likely.reserve(threads * s.likely_rows);
    thread.scored.reserve(s.likely_rows + s.most_scored + kPiece);
  }
  s.first_scores.resize(s.likely_rows);
  s.merged.reserve(s.likely_rows + s.most_scored);
  return s;
}

// What one thread takes of the scan, and the rows in it that look best.
void FusedEngine::scan_share(int i) {
  auto& s = *top_;
  const auto head = pack_->scan();
  for (auto n = s.parts.next(i); n >= 0; n = s.parts.next(i)) {
    const Range part{n * kScanPart, std::min((n + 1) * kScanPart, head.rows / kBlockRows)};
    for (size_t b = 0; b < s.bounds.size(); ++b) {
      float* const upper = s.upper_of(b);
      float* const block_upper = s.block_upper[b].data();
      kernel_.scan(head, part, s.bounds[b], upper, block_upper);
      auto& best = s.likely[static_cast<size_t>(i)][b];
      for (int64_t block = part.begin; block < part.end; ++block) {
        for (int64_t r = 0; block_upper[block] > best.bar() && r < kBlockRows; ++r) {
          const auto row = block * kBlockRows + r;
          if (upper[row] > best.bar() && row < vocab_size()) {
            best.push({row, upper[row]});
          }
        }
      }
    }
  }
}

// One thread's part of the choice for row b of the batch: scores exactly a part of what looked best, agrees with the
// others on what the k-th best must at least have, finds whatever may still reach that, then scores a part of what all
// have found, unless that turns out to be too much.
void FusedEngine::score_share(size_t b, int i) {
  auto& s = *top_;
  auto& own = s.threads[static_cast<size_t>(i)];
  own.scored.clear();
  own.survivors = 0;
  score_likely(b, i);
  team_.barrier();
  // Every thread finds the same bar.
  auto& sorted = own.scores;
  sorted.assign(s.first_scores.begin(), s.first_scores.end());
  const auto kth = sorted.begin() + s.k - 1;
  std::nth_element(sorted.begin(), kth, sorted.end(), std::greater<>());
  const float bar = *kth;
  find_rows(b, bar, i);
  team_.barrier();
  score_found(b, bar, i);
}

// Of what all threads took for likely, the best; this thread scores its share of them.
void FusedEngine::score_likely(size_t b, int i) {
  auto& s = *top_;
  auto& own = s.threads[static_cast<size_t>(i)];
  // Every thread finds the same rows, in the same order.
  auto& likely = own.likely;
  likely.clear();
  for (const auto& of_rows : s.likely) {
    likely.insert(likely.end(), of_rows[b].all().begin(), of_rows[b].all().end());
  }
  if (likely.size() > s.likely_rows) {
    const auto last = likely.begin() + static_cast<int64_t>(s.likely_rows);
    std::nth_element(likely.begin(), last, likely.end(), is_better);
    likely.erase(last, likely.end());
  }
  const auto some = team_.share(static_cast<int64_t>(s.likely_rows), i);
  size_t count = 0;
  for (auto n = some.begin; n < some.end; ++n) {
    const auto at = static_cast<size_t>(n);
    s.first_scores[at] = kNone;
    if (at < likely.size()) {
      own.rows[count++] = static_cast<int32_t>(likely[at].id);
      s.upper_of(b)[likely[at].id] = kNone;  // done with
    }
  }
  score_rows(b, own.rows.data(), count, kNone, own);
  std::copy(own.scores.begin(), own.scores.end(), s.first_scores.begin() + some.begin);
}

// Rows whose bounds reach the bar. Tokens that are often among the best stand together, at the beginning of the
// vocabulary: blocks are dealt out to the threads by turns.
void FusedEngine::find_rows(size_t b, float bar, int i) {
  auto& s = *top_;
  auto& own = s.threads[static_cast<size_t>(i)];
  const auto all = pack_->scan().rows / kBlockRows;
  int64_t blocks = 0;
  for (auto begin = i * kDealt; begin < all; begin += team_.size() * kDealt) {
    blocks += kernel_.reach(s.block_upper[b].data(),
                            {begin, std::min(begin + kDealt, all)},
                            bar,
                            own.blocks.data() + blocks);
  }
  own.found = static_cast<size_t>(kernel_.reach_rows(s.upper_of(b),
                                                     own.blocks.data(),
                                                     blocks,
                                                     bar,
                                                     blocks * kBlockRows,
                                                     own.rows.data(),
                                                     own.upper.data()));
  while (own.found > 0 && own.rows[own.found - 1] >= vocab_size()) {
    --own.found;  // the zeros that fill the last block
  }
  const auto first = i * s.most_pieces;
  s.pieces.offer(i, first, first + static_cast<int64_t>((own.found + kPiece - 1) / kPiece));
}

void FusedEngine::score_found(size_t b, float bar, int i) {
  auto& s = *top_;
  for (auto n = s.pieces.next(i); n >= 0 && s.scored_rows <= s.most_scored; n = s.pieces.next(i)) {
    auto& from = s.threads[static_cast<size_t>(n / s.most_pieces)];
    const auto begin = static_cast<size_t>(n % s.most_pieces) * kPiece;
    int32_t* const rows = from.rows.data() + begin;
    float* const bounds = from.upper.data() + begin;
    auto count = std::min(kPiece, from.found - begin);
    // Where they are many, most can be told from the best at one line of memory, most others at two more, and nearly
    // all at another three; a row of the head has twenty.
    for (const auto part :
         {kernels::ScanPart::kMajor, kernels::ScanPart::kMinor, kernels::ScanPart::kFiner}) {
      if (count <= kFewRows) {
        break;
      }
      kernel_.refine(pack_->scan(), part, rows, static_cast<int64_t>(count), s.bounds[b], bounds);
      size_t kept = 0;
      for (size_t r = 0; r < count; ++r) {
        rows[kept] = rows[r];
        bounds[kept] = bounds[r];
        kept += bounds[r] < bar ? 0 : 1;  // one that is no number, of infinite norms, says nothing
      }
      count = kept;
    }
    s.scored_rows += count;
    score_rows(b, rows, count, bar, s.threads[static_cast<size_t>(i)]);
  }
}

// As the full head scores them; those that reach the bar are kept.
void FusedEngine::score_rows(
    size_t b, const int32_t* rows, size_t count, float bar, TopThread& own) {
  const auto E = model_->cfg.emb_dim;
  const float* const x = last_.data() + static_cast<int64_t>(b) * E;
  own.scores.resize(count);
  kernel_.dot_rows(pack_->head(), rows, 0, static_cast<int64_t>(count), x, E, own.scores.data());
  own.survivors += static_cast<int64_t>(count);
  for (size_t n = 0; n < count; ++n) {
    if (own.scores[n] >= bar) {
      own.scored.push_back({rows[n], own.scores[n]});
    }
  }
}

bool FusedEngine::scan_top(int64_t k, std::vector<Candidate>& best) {
  auto& s = prepare_top(k);
  const auto head = pack_->scan();
  const auto E = model_->cfg.emb_dim;
  for (size_t b = 0; b < s.bounds.size(); ++b) {
    float* const x = s.permuted[b].data();
    for (int64_t j = 0; j < E; ++j) {
      x[j] = last_[b * static_cast<size_t>(E) + static_cast<size_t>(head.order[j])];
    }
    kernel_.quantize(x, E, s.bounds[b].x);
    kernels::bound_scan(head, x, s.bounds[b]);
  }
  s.parts.start((head.rows / kBlockRows + kScanPart - 1) / kScanPart);
  team_.run([&](int i) { scan_share(i); });
  clock_.lap("head: scan");
  best.clear();
  for (size_t b = 0; b < s.bounds.size(); ++b) {
    s.scored_rows = 0;
    team_.run([&](int i) { score_share(b, i); });
    s.merged.clear();
    for (const auto& thread : s.threads) {
      s.merged.insert(s.merged.end(), thread.scored.begin(), thread.scored.end());
      survivors_ += thread.survivors;
    }
    // Fewer than k where logits are no numbers: nothing reaches anything then.
    if (s.scored_rows > s.most_scored || s.merged.size() < static_cast<size_t>(k)) {
      survivors_ = 0;
      return false;
    }
    std::partial_sort(s.merged.begin(), s.merged.begin() + k, s.merged.end(), is_better);
    best.insert(best.end(), s.merged.begin(), s.merged.begin() + k);
  }
  clock_.lap("head: rows scored exactly");
  return true;
}

void FusedEngine::do_top(int64_t k, std::vector<Candidate>& best) {
  // Beyond some thousands, survivors are so many that the full head is no slower.
  constexpr int64_t kMostScanned = 4096;
  survivors_ = 0;
  clock_.start();
  normalize_last();
  if (!options_.fused.two_stage_head || last_logits_.defined() || k > kMostScanned ||
      !scan_top(k, best)) {
    Engine::do_top(k, best);
  }
}

// Logits (count, V) of x (count, E). Some rows of the head stay in the second cache while every row of x passes.
void FusedEngine::full_logits(const float* x, int64_t count, float* y) {
  constexpr int64_t kHeadRows = 256;
  const auto E = model_->cfg.emb_dim, V = vocab_size();
  team_.run([&](int i) {
    const auto share = team_.share(V, i);
    for (int64_t begin = share.begin; begin < share.end; begin += kHeadRows) {
      const auto rows = std::min(kHeadRows, share.end - begin);
      for (int64_t n = 0; n < count; ++n) {
        kernel_.dot_rows(pack_->head(), nullptr, begin, rows, x + n * E, E, y + n * V + begin);
      }
    }
  });
}

at::Tensor FusedEngine::logits(Rows rows) {
  const auto E = model_->cfg.emb_dim, V = vocab_size();
  if (rows == Rows::kLast) {
    normalize_last();
    if (!last_logits_.defined()) {
      clock_.start();
      auto logits = at::empty({batch(), 1, V}, at::kFloat);
      full_logits(last_.data(), batch(), logits.mutable_data_ptr<float>());
      last_logits_ = logits;
      clock_.lap("head: full");
    }
    return last_logits_;
  }
  check(hidden_tokens_ > 0, "[logits] expected an append since the last reset or rewind, got none");
  constexpr int64_t kAtOnce = 64;  // rows of x that pass: they too must leave the cache to the head
  auto logits = at::empty({batch(), hidden_tokens_, V}, at::kFloat);
  const auto all = batch() * hidden_tokens_;
  std::vector<float> x(static_cast<size_t>(std::min(kAtOnce, all) * E));
  for (int64_t start = 0; start < all; start += kAtOnce) {
    const auto count = std::min(kAtOnce, all - start);
    for (int64_t n = 0; n < count; ++n) {
      normalize(start + n, x.data() + n * E);
    }
    full_logits(x.data(), count, logits.mutable_data_ptr<float>() + start * V);
  }
  return logits;
}

}  // namespace gemma_torch
