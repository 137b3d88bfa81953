#include "gemma_torch/inspect/integrated_gradients.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "gemma_torch/base/error.h"
#include "gemma_torch/base/tensor_map.h"

namespace gemma_torch {
namespace {

// A point of the path.
struct Node {
  double value = 0;   // of the target
  at::Tensor slopes;  // (T) float64: its derivative along the path, by token
};

// The straight line from 0, the baseline, to 1, the embeddings.
class Path {
 public:
  Path(const Gemma3Model& model,
       const std::vector<int64_t>& ids,
       const SaliencyTarget& target,
       const IntegrationOptions& options)
      : model_(model), ids_(ids), target_(target), options_(options) {
    const auto embed = embeddings_of(model, ids);  // (T, E)
    const auto& given = options.baseline;
    check(given.defined() && (given.dim() == 1 || given.dim() == 2) &&
              given.size(-1) == embed.size(1) &&
              (given.dim() == 1 || given.size(0) == embed.size(0)),
          "[saliency] baseline: expected ({1}) or ({0}, {1}), got {2}",
          embed.size(0),
          embed.size(1),
          given.defined() ? shape_str(given.sizes()) : "none");
    start_ = given.to(embed.options()).expand_as(embed).clone();
    if (options.keep_first) {
      start_[0].copy_(embed[0]);
    }
    way_ = embed - start_;
    check(way_.abs().max().item<double>() > 0,
          "[saliency] baseline: expected one that differs from the prompt, got the prompt's own "
          "embeddings");
  }

  const Node& at(double place) const { return nodes_.at(place); }
  int64_t steps() const { return static_cast<int64_t>(nodes_.size()); }

  // Computes those of the places that are not known yet.
  void visit(std::vector<double> places) {
    std::erase_if(places, [&](double place) { return nodes_.count(place) > 0; });
    const auto room = std::max<size_t>(1, static_cast<size_t>(options_.tokens) / ids_.size());
    for (size_t begin = 0; begin < places.size(); begin += room) {
      const auto end = std::min(places.size(), begin + room);
      run({places.begin() + static_cast<int64_t>(begin),
           places.begin() + static_cast<int64_t>(end)});
      check(!options_.on_progress || options_.on_progress(steps(), options_.steps),
            "[saliency] stopped after {} gradients, nothing was written",
            steps());
    }
  }

 private:
  void run(const std::vector<double>& places) {
    const auto share = at::tensor(places, at::kDouble).to(way_.options()).view({-1, 1, 1});
    const auto found = embedding_gradient(model_, ids_, target_, start_ + share * way_);
    const auto slopes = found.gradient.to(at::kCPU, at::kDouble) * way_.to(at::kCPU, at::kDouble);
    for (size_t i = 0; i < places.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      const auto value = found.values[row].item<double>();
      const auto slope = slopes[row].sum(/*dim=*/1);
      check(std::isfinite(value) && std::isfinite(slope.sum().item<double>()),
            "[saliency] path: expected finite numbers, got value {} and slope {} at {:.3g} of it. "
            "Hint: another baseline",
            value,
            slope.sum().item<double>(),
            places[i]);
      nodes_[places[i]] = {value, slope};
    }
  }

  const Gemma3Model& model_;
  const std::vector<int64_t>& ids_;
  const SaliencyTarget& target_;
  const IntegrationOptions& options_;
  at::Tensor start_, way_;  // (T, E)
  std::map<double, Node> nodes_;
};

struct Interval {
  double begin = 0, end = 1;
  double error = -1;  // of the integral; below 0: not known yet

  double middle() const { return (begin + end) / 2; }

  // (T), by Simpson's rule.
  at::Tensor integral(const Path& path) const {
    const auto ends = path.at(begin).slopes + path.at(end).slopes;
    return (ends + 4 * path.at(middle()).slopes) * ((end - begin) / 6);
  }
};

// Ends and middles of those whose error is not known.
std::vector<double> places_of(const std::vector<Interval>& intervals) {
  std::vector<double> places;
  for (const auto& interval : intervals) {
    if (interval.error >= 0) {
      continue;
    }
    places.insert(places.end(), {interval.begin, interval.middle(), interval.end});
  }
  std::sort(places.begin(), places.end());
  places.erase(std::unique(places.begin(), places.end()), places.end());
  return places;
}

// Visits the intervals whose error is not known, and sets it. Returns the sum of all errors.
double measure(std::vector<Interval>& intervals, Path& path) {
  path.visit(places_of(intervals));
  double sum = 0;
  for (auto& interval : intervals) {
    if (interval.error < 0) {
      const auto whole = path.at(interval.end).value - path.at(interval.begin).value;
      interval.error = std::abs(interval.integral(path).sum().item<double>() - whole);
    }
    sum += interval.error;
  }
  return sum;
}

// Halves the intervals that are wrong by more than `share`, the worst first, `most` of them.
std::vector<Interval> refined(std::vector<Interval> intervals, double share, int64_t most) {
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) {
    return a.error > b.error;
  });
  std::vector<Interval> result;
  for (const auto& interval : intervals) {
    if (interval.error > share && most-- > 0) {
      result.push_back({interval.begin, interval.middle()});
      result.push_back({interval.middle(), interval.end});
    } else {
      result.push_back(interval);
    }
  }
  return result;
}

// Intervals that are right enough, or as many as `steps` allow.
std::vector<Interval> integrate(Path& path, const IntegrationOptions& options) {
  constexpr int kFirst = 8;       // intervals to begin with
  constexpr int64_t kAtOnce = 8;  // halved between two looks at the errors
  std::vector<Interval> intervals;
  for (int i = 0; i < kFirst; ++i) {
    intervals.push_back({i / double{kFirst}, (i + 1) / double{kFirst}});
  }
  auto error = measure(intervals, path);
  const auto allowed = options.tolerance * std::abs(path.at(1).value - path.at(0).value);
  for (auto left = options.steps - path.steps(); error > allowed && left >= 2;
       left = options.steps - path.steps()) {  // each halving needs two points
    const auto share = allowed / (2 * static_cast<double>(intervals.size()));
    intervals = refined(std::move(intervals), share, std::min(kAtOnce, left / 2));
    error = measure(intervals, path);
  }
  return intervals;
}

}  // namespace

double IntegratedGradients::completeness_error() const {
  const auto whole = value - baseline;
  return std::abs(scores.sum().item<double>() - whole) / std::abs(whole);
}

IntegratedGradients integrated_gradients(Gemma3Model model,
                                         const std::vector<int64_t>& ids,
                                         const SaliencyTarget& target,
                                         const IntegrationOptions& options) {
  check(options.steps >= IntegrationOptions::kFewestSteps,
        "[saliency] steps: expected at least {}, got {}",
        IntegrationOptions::kFewestSteps,
        options.steps);
  check(options.tokens >= 1, "[saliency] tokens: expected at least 1, got {}", options.tokens);
  Path path(model, ids, target, options);
  const auto intervals = integrate(path, options);
  IntegratedGradients result{.value = path.at(1).value,
                             .baseline = path.at(0).value,
                             .scores = at::zeros({static_cast<int64_t>(ids.size())}, at::kDouble),
                             .steps = path.steps()};
  for (const auto& interval : intervals) {
    result.scores += interval.integral(path);
  }
  return result;
}

}  // namespace gemma_torch
