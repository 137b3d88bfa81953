#include "finetune_run.h"

#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <sstream>

#include "common.h"
#include "gemma_torch/base/atomic_file.h"
#include "gemma_torch/base/device.h"
#include "gemma_torch/base/error.h"

namespace gemma_torch::apps {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string minutes(double seconds) {
  const auto whole = std::lround(seconds);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

void check_same(const json& now, const json& then, const std::string& place) {
  for (const auto& [name, value] : now.items()) {
    const auto before = then.value(name, json());
    check(before == value,
          "[finetune] {}: {}: expected {}, as the run began with, got {}. Hint: resume with the "
          "same flags, or begin another --out",
          place,
          name,
          before.dump(),
          value.dump());
  }
}

}  // namespace

FinetuneRun::FinetuneRun(const FinetuneParts& parts, FinetuneSchedule schedule)
    : parts_(parts), schedule_(std::move(schedule)) {
  if (leads()) {
    open();
  }
  join();
}

void FinetuneRun::open() {
  checkpoints_.emplace(schedule_.out + "/checkpoints");
  const auto found = checkpoints_->steps();
  check(found.empty() || schedule_.resume,
        "[finetune] {}: expected a new folder, got one with a run at step {}. Hint: --resume, or "
        "another --out",
        schedule_.out,
        found.empty() ? 0 : found.back());
  trim_log(found.empty() ? 0 : found.back());
  if (!found.empty()) {
    resume(found.back());
  }
  log_.open(schedule_.out + "/log.jsonl", std::ios::app);
  check(log_.is_open(), "[finetune] {}/log.jsonl: cannot be written", schedule_.out);
}

void FinetuneRun::resume(int64_t step) {
  const auto facts = checkpoints_->facts(step);
  check_same(schedule_.facts, facts.value("run", json::object()), schedule_.out);
  checkpoints_->load(step, *parts_.trainer);
  worse_ = facts.value("worse", int64_t{0});
  if (const auto best = facts.value("best", json()); best.is_object()) {
    summary_.best = {best.value("step", int64_t{0}), best.value("loss", 0.0)};
  }
  summary_.stopped_early = schedule_.patience > 0 && worse_ >= schedule_.patience;
  fmt::print(stderr, "gemma: {}: going on after step {}\n", schedule_.out, step);
}

// What rank 0 knows of the run, on every rank.
void FinetuneRun::join() {
  parts_.trainer->join(parts_.ranks);
  const auto best = summary_.best.value_or(Best{-1, 0.0});
  const auto known = at::tensor({static_cast<double>(worse_),
                                 static_cast<double>(summary_.stopped_early),
                                 static_cast<double>(best.step),
                                 best.loss},
                                at::kDouble);
  parts_.ranks.broadcast(known);
  const auto* of_rank_0 = known.const_data_ptr<double>();
  worse_ = std::lround(of_rank_0[0]);
  summary_.stopped_early = of_rank_0[1] != 0;
  if (of_rank_0[2] >= 0) {
    summary_.best = {std::lround(of_rank_0[2]), of_rank_0[3]};
  }
}

// Whether Ctrl-C was seen, on any rank.
bool FinetuneRun::stopped() const {
  std::vector<double> seen = {interrupted() ? 1.0 : 0.0};
  parts_.ranks.sum(seen);
  return seen[0] > 0;
}

// Lines of steps that are done again are dropped, and one whose writing was cut.
void FinetuneRun::trim_log(int64_t step) {
  const auto path = schedule_.out + "/log.jsonl";
  if (!fs::exists(path)) {
    return;
  }
  std::string kept;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) {
    const auto row = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (row.is_object() && row.value("step", int64_t{0}) <= step) {
      kept += line + "\n";
    }
  }
  write_file(path, kept);
}

void FinetuneRun::log(const json& row) {
  if (!leads()) {
    return;
  }
  log_ << row.dump() << std::endl;
  check(
      log_.good(), "[finetune] {}/log.jsonl: cannot be written. Hint: a full disk?", schedule_.out);
}

bool FinetuneRun::due(int64_t every) const {
  const auto steps = parts_.trainer->steps();
  return parts_.trainer->done() || (every > 0 && steps % every == 0);
}

void FinetuneRun::show(const StepReport& report) {
  if (!leads() || !is_terminal(STDERR_FILENO)) {
    return;
  }
  const auto total = parts_.trainer->options().steps;
  const auto done = summary_.steps;
  const auto left =
      summary_.seconds / static_cast<double>(done) * static_cast<double>(total - report.step);
  fmt::print(stderr,
             "\r\x1b[Kstep {} of {}  loss {:.4f}  {:.0f} tok/s  {:.2f} GB  {} left",
             report.step,
             total,
             report.loss,
             static_cast<double>(summary_.tokens) / summary_.seconds,
             static_cast<double>(peak_memory_bytes()) / 1e9,
             minutes(left));
}

void FinetuneRun::evaluate_now() {
  const auto step = parts_.trainer->steps();
  Progress progress("evaluating: batches");
  int64_t seen = 0;
  const auto own = evaluate(parts_.model, *parts_.pass, *parts_.held_out, [&] {
    if (leads()) {
      progress.show(seen += parts_.ranks.size(), parts_.held_out->per_epoch(0));
    }
    return true;
  });
  const auto found = combined(own, parts_.ranks);
  log({{"step", step}, {"eval_loss", found.loss}, {"eval_targets", found.targets}});
  const bool better = !summary_.best || found.loss < summary_.best->loss;
  worse_ = better ? 0 : worse_ + 1;
  if (better) {
    summary_.best = {step, found.loss};
  }
  if (!leads()) {
    return;
  }
  fmt::print(stderr,
             "{}step {}: loss on held-out data {:.4f}{}\n",
             is_terminal(STDERR_FILENO) ? "\r\x1b[K" : "",
             step,
             found.loss,
             better ? ", the best so far" : "");
}

void FinetuneRun::save() {
  if (!leads()) {
    return;
  }
  const auto step = parts_.trainer->steps();
  json facts = {{"run", schedule_.facts}, {"worse", worse_}, {"best", nullptr}};
  std::vector<int64_t> wanted = checkpoints_->steps();
  wanted.erase(wanted.begin(), wanted.end() - std::min<std::ptrdiff_t>(1, std::ssize(wanted)));
  wanted.push_back(step);
  if (summary_.best) {
    facts["best"] = {{"step", summary_.best->step}, {"loss", summary_.best->loss}};
    wanted.push_back(summary_.best->step);
  }
  checkpoints_->save(*parts_.trainer, facts);
  checkpoints_->keep_only(wanted);
}

void FinetuneRun::account(const StepReport& report, double seconds) {
  ++summary_.steps;
  summary_.tokens += report.tokens;
  summary_.seconds += seconds;
  summary_.waited += report.waited;
  summary_.loss = report.loss;
  json row = {{"step", report.step},
              {"epoch", report.epoch},
              {"loss", report.loss},
              {"grad_norm", report.grad_norm},
              {"learning_rate", report.learning_rate},
              {"tokens", report.tokens},
              {"targets", report.targets},
              {"seconds", seconds}};
  if (parts_.ranks.size() > 1) {
    row["waited_seconds"] = report.waited;
  }
  log(row);
  show(report);
}

FinetuneSummary FinetuneRun::run() {
  auto& trainer = *parts_.trainer;
  catch_interrupt();
  if (parts_.held_out != nullptr && trainer.steps() == 0) {
    evaluate_now();
    save();
  }
  while (!trainer.done() && !summary_.stopped_early) {
    const auto start = Clock::now();
    const auto report = trainer.step();
    account(report, seconds_since(start));
    const bool evaluates = parts_.held_out != nullptr && due(schedule_.eval_every);
    if (evaluates) {
      evaluate_now();
      summary_.stopped_early = schedule_.patience > 0 && worse_ >= schedule_.patience;
    }
    const bool stop = stopped();
    if (evaluates || due(schedule_.save_every) || stop) {
      save();
    }
    check(!stop || trainer.done(),
          "[finetune] stopped after step {} of {}, which is kept in {}. Hint: the same command "
          "with --resume goes on",
          report.step,
          trainer.options().steps,
          schedule_.out);
  }
  if (leads() && is_terminal(STDERR_FILENO)) {
    fmt::print(stderr, "\r\x1b[K");
  }
  if (leads() && summary_.best && summary_.best->step != trainer.steps()) {
    checkpoints_->load(summary_.best->step, trainer);
  }
  return summary_;
}

}  // namespace gemma_torch::apps
