#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "bench_run.h"
#include "roofline.h"

namespace gemma_torch::apps {

/// Of samples; stddev is the sample's own (n - 1), 0 of one.
struct Spread {
  double mean = 0, stddev = 0, median = 0, min = 0, max = 0;
};
Spread spread(std::vector<double> samples);

/// Above it, what was read is faster than memory is: the roofline was measured wrong.
constexpr double kMostShare = 1.05;

/// llama-bench's fields under its names and in its order, then ours. Rates count the tokens of all
/// rows. `bytes_per_token` is of one step, whatever the rows; `achieved_gb_s` takes the median.
/// `roofline_share` is the median of the repetitions' own, each against the readings beside it. Null where there is
/// nothing to say: those two, and the share, of a test that reads a prompt, which is bound by arithmetic.
nlohmann::ordered_json make_record(const BenchTest& test,
                                   const BenchResult& result,
                                   const Roofline& roofline,
                                   const Pretrained& loaded,
                                   const ModelOptions& options);

}  // namespace gemma_torch::apps
