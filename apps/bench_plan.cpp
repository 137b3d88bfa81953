#include "bench_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;  // for a number; products of two still fit 64 bits
constexpr size_t kMostValues = 1000;         // for a list: a typing error, not a plan
constexpr int64_t kMostThreads = 1024;

struct Range {
  int64_t first = 0;
  int64_t last = 0;
  int64_t step = 1;
  bool multiply = false;
};

// Reads a number at the start of `rest` and takes it away; -1 if there is none.
int64_t take_number(std::string_view& rest) {
  int64_t value = -1;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  if (error != std::errc() || value < 0 || value > kMost) {
    return -1;
  }
  rest.remove_prefix(static_cast<size_t>(end - rest.data()));
  return value;
}

// first[-last[+step or *factor]]; false where it is something else, or would never end.
bool read_range(std::string_view word, Range& range) {
  range.first = range.last = take_number(word);
  if (word.starts_with('-')) {
    word.remove_prefix(1);
    range.last = take_number(word);
    if (word.starts_with('+') || word.starts_with('*')) {
      range.multiply = word.front() == '*';
      word.remove_prefix(1);
      range.step = take_number(word);
    }
  }
  const bool grows = range.multiply ? range.step >= 2 && range.first >= 1 : range.step >= 1;
  return word.empty() && range.first >= 0 && range.last >= range.first && grows;
}

void add_range(const std::string& flag,
               std::string_view word,
               int64_t least,
               std::vector<int64_t>& values) {
  Range range;
  check(read_range(word, range),
        "[bench] {}: expected numbers such as 512, 1,2,4, 128-512+128 or 1-64*2, got \"{}\"",
        flag,
        word);
  check(range.first >= least, "[bench] {}: expected at least {}, got \"{}\"", flag, least, word);
  for (auto value = range.first; value <= range.last && values.size() <= kMostValues;
       value = range.multiply ? value * range.step : value + range.step) {
    values.push_back(value);
  }
  check(values.size() <= kMostValues,
        "[bench] {}: expected at most {} values, got more in \"{}\"",
        flag,
        kMostValues,
        word);
}

// Throws an Error naming the flag for what is no list, or a number below `least`.
std::vector<int64_t> parse_lists(const std::string& flag,
                                 const std::vector<std::string>& lists,
                                 int64_t least) {
  std::vector<int64_t> values;
  for (const auto& list : lists) {
    size_t start = 0;
    while (start <= list.size()) {
      const auto end = std::min(list.find(',', start), list.size());
      add_range(flag, std::string_view(list).substr(start, end - start), least, values);
      start = end + 1;
    }
  }
  return values;
}

// "512,128": a prompt and the tokens generated after it.
BenchTest parse_pair(const std::string& text) {
  BenchTest test;
  std::string_view rest = text;
  test.n_prompt = take_number(rest);
  const bool comma = rest.starts_with(',');
  rest.remove_prefix(comma ? 1 : 0);
  test.n_gen = take_number(rest);
  check(comma && rest.empty() && test.n_prompt >= 0 && test.n_gen >= 0,
        "[bench] -pg: expected two numbers such as 512,128, got \"{}\"",
        text);
  return test;
}

// What is run in each setting. Zero lengths are llama-bench's way to leave a kind of test out.
std::vector<BenchTest> lengths(const BenchLists& lists) {
  std::vector<BenchTest> tests;
  for (const auto n : parse_lists("-p", lists.prompts, 0)) {
    tests.push_back({.n_prompt = n});
  }
  for (const auto n : parse_lists("-n", lists.gens, 0)) {
    tests.push_back({.n_gen = n});
  }
  for (const auto& pair : lists.pairs) {
    tests.push_back(parse_pair(pair));
  }
  std::erase_if(tests, [](const BenchTest& test) { return test.n_prompt + test.n_gen == 0; });
  check(!tests.empty(), "[bench] expected a test, got none. Hint: -p 512 or -n 128");
  return tests;
}

std::vector<int64_t> thread_counts(const std::vector<std::string>& lists) {
  if (lists.empty()) {
    return {usable_cores()};
  }
  const auto counts = parse_lists("-t", lists, 1);
  const auto most = *std::max_element(counts.begin(), counts.end());
  check(most <= kMostThreads, "[bench] -t: expected at most {}, got {}", kMostThreads, most);
  return counts;
}

// Each setting once for every value of one field, which so changes more often than those before.
std::vector<BenchTest> with_each(const std::vector<BenchTest>& settings,
                                 int64_t BenchTest::* field,
                                 const std::vector<int64_t>& values) {
  std::vector<BenchTest> all;
  for (const auto& setting : settings) {
    for (const auto value : values) {
      all.push_back(setting);
      all.back().*field = value;
    }
  }
  return all;
}

}  // namespace

std::string test_name(const BenchTest& test) {
  std::string name = test.n_prompt > 0 ? fmt::format("pp{}", test.n_prompt) : "";
  if (test.n_gen > 0) {
    name += fmt::format("{}tg{}", name.empty() ? "" : "+", test.n_gen);
  }
  return test.n_depth > 0 ? fmt::format("{} @ d{}", name, test.n_depth) : name;
}

std::vector<BenchTest> plan(const BenchLists& lists) {
  std::vector<BenchTest> settings = {{}};
  settings = with_each(settings, &BenchTest::n_batch, parse_lists("-b", lists.batches, 1));
  settings = with_each(settings, &BenchTest::n_ubatch, parse_lists("-ub", lists.ubatches, 1));
  settings = with_each(settings, &BenchTest::n_threads, thread_counts(lists.threads));
  settings = with_each(settings, &BenchTest::n_depth, parse_lists("-d", lists.depths, 0));
  settings =
      with_each(settings, &BenchTest::n_sequences, parse_lists("--sequences", lists.sequences, 1));
  settings = with_each(settings, &BenchTest::top_k, parse_lists("--top-k", lists.top_ks, 1));
  const auto tests = lengths(lists);
  std::vector<BenchTest> all;
  for (const auto& setting : settings) {
    for (const auto& test : tests) {
      all.push_back(setting);
      all.back().n_prompt = test.n_prompt;
      all.back().n_gen = test.n_gen;
    }
  }
  return all;
}

}  // namespace gemma_torch::apps
