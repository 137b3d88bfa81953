// Threads that work together: each job on every thread, barriers that hold, indices handed out
// once.

#include <array>
#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "gemma_torch/kernels/shares.h"
#include "gemma_torch/kernels/team.h"

namespace gemma_torch::kernels::test {
namespace {

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}

// Every thread writes its own number, and past a barrier reads all of them. Nothing here is atomic
// but by the team.
void rounds_of_barriers(Check& check, Team& team, int rounds) {
  const int size = team.size();
  std::vector<int64_t> written(index(2 * size)), wrong(index(size));
  team.run([&](int i) {
    for (int round = 0; round < rounds; ++round) {
      int64_t* now = written.data() + round % 2 * size;
      now[i] = round * 100 + i;
      team.barrier();
      for (int other = 0; other < size; ++other) {
        wrong[index(i)] += now[other] == round * 100 + other ? 0 : 1;
      }
    }
  });
  for (const auto count : wrong) {
    check.near(static_cast<double>(count), 0, 0);
  }
}

// After each barrier claim() starts from 0, and gives each index to one thread.
void rounds_of_claims(Check& check, Team& team, int rounds) {
  constexpr int64_t kThings = 37;
  std::vector<int> taken(index(kThings));
  std::vector<int64_t> wrong(index(team.size()));
  team.run([&](int i) {
    for (int round = 1; round <= rounds; ++round) {
      for (int64_t n = team.claim(); n < kThings; n = team.claim()) {
        ++taken[index(n)];
      }
      team.barrier();
      for (const auto count : taken) {
        wrong[index(i)] += count == round ? 0 : 1;
      }
      team.barrier();
    }
  });
  for (const auto count : wrong) {
    check.near(static_cast<double>(count), 0, 0);
  }
}

// Every part is taken once, also where one thread sleeps over its share.
void rounds_of_shares(Check& check, Team& team, int rounds) {
  constexpr int64_t kParts = 61;
  Shares shares(team);
  std::vector<int> taken(index(kParts));
  int64_t wrong = 0;
  for (int round = 1; round <= rounds; ++round) {
    const bool slow = round % (rounds / 4 + 1) == 0;
    const auto parts = round % 2 == 0 ? kParts : team.size() - 1;  // a share may be empty
    shares.start(parts);
    std::atomic<int> late{0};
    team.run([&](int i) {
      for (auto n = shares.next(i); n >= 0; n = shares.next(i)) {
        ++taken[index(n)];
        if (slow && i == 0 && late++ == 0) {
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
      }
    });
    for (int64_t n = 0; n < kParts; ++n) {
      wrong += taken[index(n)] == (n < parts ? 1 : 0) ? 0 : 1;
      taken[index(n)] = 0;
    }
  }
  check.near(static_cast<double>(wrong), 0, 0);
}

void rounds_of_runs(Check& check, Team& team, int rounds) {
  std::vector<int64_t> runs(index(team.size()));
  int64_t in_order = 0;
  for (int round = 0; round < rounds; ++round) {
    if (round % (rounds / 4) == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the others fall asleep
    }
    int64_t total = 0;
    std::atomic<int64_t> claimed{0};
    team.run([&](int i) {
      ++runs[index(i)];
      for (int64_t n = team.claim(); n < 8; n = team.claim()) {
        claimed += n;
      }
    });
    for (const auto count : runs) {
      total += count;
    }
    in_order += total == int64_t{team.size()} * (round + 1) && claimed == 28 ? 1 : 0;
  }
  check.near(static_cast<double>(in_order), rounds, 0);
  for (const auto count : runs) {
    check.near(static_cast<double>(count), rounds, 0);
  }
}

}  // namespace

void check_team(Report& report, bool small) {
  // More threads than cores take a slice of the scheduler's time for each barrier: fewer rounds.
  struct Size {
    int threads, rounds;
  };
  for (const auto& size : {Size{1, 20000}, Size{2, 20000}, Size{5, 2000}, Size{16, 300}}) {
    report.check("team of " + std::to_string(size.threads), [&](Check& check) {
      Team team(size.threads, /*pin=*/false);
      check.that(team.size() == size.threads);
      const int n = small ? size.rounds / 20 : size.rounds;
      rounds_of_barriers(check, team, n);
      rounds_of_claims(check, team, n);
      rounds_of_shares(check, team, n);
      rounds_of_runs(check, team, n);
      int64_t shared = 0;
      for (int i = 0; i < size.threads; ++i) {
        check.that(team.share(37, i).begin == shared);
        shared = team.share(37, i).end;
      }
      check.that(shared == 37);
    });
  }
  report.check("a share from its front, then others' from their back", [&](Check& check) {
    const Team team(3);
    Shares shares(team);
    shares.start(10);  // 0-2, 3-5, 6-9
    const auto all = [&](int i, const std::vector<int64_t>& expected) {
      for (const auto n : expected) {
        check.near(static_cast<double>(shares.next(i)), static_cast<double>(n), 0);
      }
    };
    all(1, {3, 4, 5, 9, 2, 8});
    all(0, {0, 1, 7});
    all(2, {6, -1});
    all(0, {-1});
    all(1, {-1, -1});
    shares.start(1);
    all(0, {0, -1});
    all(1, {-1});
    for (const auto& [i, begin, end] : {std::array{0, 100, 102}, {1, 200, 200}, {2, 300, 303}}) {
      shares.offer(i, begin, end);
    }
    all(0, {100});
    all(1, {302, 301});
    all(2, {300, 101, -1});
    all(0, {-1});
  });
  report.check("teams come and go, pinned and not", [&](Check& check) {
    for (int i = 0; i < (small ? 10 : 200); ++i) {
      Team team(1 + i % 4, i % 2 == 1);
      std::atomic<int> ran{0};
      if (i % 3 != 0) {
        team.run([&](int) { ++ran; });
      }
      check.that(ran == (i % 3 != 0 ? team.size() : 0));
    }
  });
}

}  // namespace gemma_torch::kernels::test
