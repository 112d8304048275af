// group_advantages, written once for the CPU and for a block of CUDA threads: what a team of threads does with B rows.
//
// The team sweeps over the rows a few times and waits for its last thread after each sweep. A hash table of row numbers
// (open addressing) finds the groups; a group goes by the number of one of its rows. Sums over a group are taken in
// fixed point, relative to its smallest reward and to its range: integer additions commute, so the result depends
// neither on the order of the threads nor on that of the rows, and equal rewards give exactly 0.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLASHPO_TEAM __device__
#else
#define FLASHPO_TEAM
#endif

namespace flashpo::advantages {

constexpr int MAX_FUNCTIONS = 64;
constexpr int32_t FREE = -1;                      // a slot of the table without a row
constexpr double ONE = 1152921504606846976.0;     // 2^60: the fixed-point form of 1
constexpr double WHITENING_EPS = 1e-8;            // verl's masked_whiten adds it to the variance

enum Baseline { MEAN, LEAVE_ONE_OUT, SECOND_BEST, NONE };  // in the order of BASELINES in Python
enum Scale { GROUP, BATCH, UNSCALED };                     // and of SCALES

// What is known of the scorable rewards of one group, or of the whole batch.
struct Group {
  int64_t count = 0, weight = 0;  // rows, and the sum of their lengths (the rows again where no lengths are given)
  int32_t low = INT32_MAX, high = INT32_MIN;   // the smallest and the largest, as `ordered`
  int32_t second = INT32_MIN, at_high = 0;     // the largest below `high`, and how many rows have `high`
  int64_t sum = 0, squares = 0;                // means of t = (x - low) / range and of (t - mean)^2; 2^60 stands for 1
  double centre = 0, offset = 0, factor = 1;   // x - baseline = (x - centre - offset) factor
  double std = 0;
};

struct Problem {
  int64_t rows, functions;
  const float* rewards;    // (rows, functions)
  const int64_t* group;    // (rows)
  const int64_t* lengths;  // (rows), or nullptr
  double reward_weights[MAX_FUNCTIONS];
  Baseline baseline;
  Scale scale;
  bool normalize_first;  // each function by itself, then their sum: GDPO
  double eps;
  bool raw_singletons;  // a group with one scorable reward keeps it as its advantage
  float *advantage, *mean, *std;
  bool* degenerate;
  // scratch
  int64_t capacity;  // a power of two
  Group* groups;     // (rows, columns), then one for the batch
  int32_t* id;       // (rows): the row that stands for this one's group
  int32_t* table;    // (capacity)

  FLASHPO_TEAM int64_t columns() const { return normalize_first ? functions : 1; }
};

// Floats as integers of the same order: atomics have a minimum and a maximum of integers alone.
FLASHPO_TEAM inline int32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
FLASHPO_TEAM inline double unordered(int32_t bits) {
  if (bits < 0) bits ^= 0x7fffffff;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Keys are often regular (prompt << 32 | turn): every bit of the result depends on all of theirs (splitmix64).
FLASHPO_TEAM inline uint64_t hash(uint64_t key) {
  key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
  key = (key ^ key >> 27) * 0x94d049bb133111eb;
  return key ^ key >> 31;
}

FLASHPO_TEAM inline double range(const Group& g) { return g.count > 0 ? unordered(g.high) - unordered(g.low) : 0; }
FLASHPO_TEAM inline double scaled(double x, double std, double eps) { return std > 0 ? x / (std + eps) : 0; }

// From sums to mean and standard deviation (ddof 1).
FLASHPO_TEAM inline void close(Group& g) {
  const double width = range(g), weight = static_cast<double>(g.weight);
  g.centre = g.count > 0 ? unordered(g.low) : NAN;
  g.offset = width * (g.sum / ONE);
  g.std = g.count == 0 ? NAN : g.weight > 1 ? width * std::sqrt(g.squares / ONE * (weight / (weight - 1))) : 0;
}

// And to the baseline that the problem asks for.
FLASHPO_TEAM inline void close(Group& g, const Problem& p) {
  close(g);
  const bool alone = g.count == 1;
  if (p.baseline == SECOND_BEST && g.count > 0) {
    g.centre = unordered(alone || g.at_high > 1 ? g.high : g.second);
    g.offset = 0;
  } else if (alone && p.raw_singletons) {
    g.centre = g.offset = 0;
    g.std = 1;
  } else if (p.baseline == NONE) {
    g.centre = g.offset = 0;
  } else if (p.baseline == LEAVE_ONE_OUT && g.count > 1) {
    g.factor = static_cast<double>(g.count) / static_cast<double>(g.count - 1);
  }
}

template <class Team>
struct Run {
  const Problem& p;
  Team team;

  template <class F>
  FLASHPO_TEAM void each_row(F f) {
    for (int64_t row = team.rank(); row < p.rows; row += team.size()) f(row);
    team.wait();
  }

  FLASHPO_TEAM Group& batch() { return p.groups[p.rows * p.columns()]; }
  FLASHPO_TEAM Group* groups_of(int64_t row) { return p.groups + p.id[row] * p.columns(); }

  // The weighted sum over the functions that scored the row, rounded once; NaN where none did.
  FLASHPO_TEAM float combined(int64_t row) {
    double sum = 0;
    bool scored = false;
    for (int64_t k = 0; k < p.functions; ++k) {
      const float x = p.rewards[row * p.functions + k];
      team.require(!std::isinf(x), "rewards must be finite, or NaN where there is none");
      if (std::isnan(x)) continue;
      sum += x * p.reward_weights[k];
      scored = true;
    }
    team.require(!std::isinf(static_cast<float>(sum)), "the weighted sum of rewards overflows float32");
    return scored ? static_cast<float>(sum) : NAN;
  }

  FLASHPO_TEAM void find_group(int64_t row) {
    const int32_t mine = static_cast<int32_t>(row);
    const int64_t key = p.group[row];
    for (uint64_t slot = hash(key);; ++slot) {
      const int32_t found = team.claim(&p.table[slot & (p.capacity - 1)], mine);
      if (found != FREE && p.group[found] != key) continue;
      p.id[row] = found == FREE ? mine : found;
      break;
    }
    if (p.id[row] == mine)
      for (int64_t c = 0; c < p.columns(); ++c) groups_of(row)[c] = Group{};
  }

  // Counts, extremes, means and squared deviations of value(row, column) in the groups where(row)[column].
  template <class Value, class Where>
  FLASHPO_TEAM void gather(int64_t columns, Value value, Where where, const int64_t* lengths) {
    const auto weight = [&](int64_t row) { return lengths ? lengths[row] : 1; };
    each_row([&](int64_t row) {
      if (lengths) team.require(lengths[row] > 0, "lengths must be positive");
      for (int64_t c = 0; c < columns; ++c) {
        const float x = value(row, c);
        if (std::isnan(x)) continue;
        Group& g = where(row)[c];
        team.add(&g.count, int64_t{1});
        team.add(&g.weight, weight(row));
        team.lower(&g.low, ordered(x));
        team.raise(&g.high, ordered(x));
      }
    });
    each_row([&](int64_t row) {
      for (int64_t c = 0; c < columns; ++c) {
        const float x = value(row, c);
        if (std::isnan(x)) continue;
        Group& g = where(row)[c];
        if (p.baseline == SECOND_BEST) {
          if (x == unordered(g.high)) team.add(&g.at_high, int32_t{1});
          else team.raise(&g.second, ordered(x));
        }
        if (const double width = range(g); width > 0)
          team.add(&g.sum, static_cast<int64_t>((x - unordered(g.low)) / width * weight(row) / g.weight * ONE));
      }
    });
    each_row([&](int64_t row) {
      for (int64_t c = 0; c < columns; ++c) {
        const float x = value(row, c);
        Group& g = where(row)[c];
        const double width = range(g);
        if (std::isnan(x) || !(width > 0)) continue;
        const double d = (x - unordered(g.low)) / width - g.sum / ONE;
        team.add(&g.squares, static_cast<int64_t>(d * d * weight(row) / g.weight * ONE));
      }
    });
  }

  // The same over all rows, of the values that stand in `advantage`.
  FLASHPO_TEAM void gather_batch(const int64_t* lengths) {
    gather(1, [&](int64_t row, int64_t) { return p.advantage[row]; }, [&](int64_t) { return &batch(); }, lengths);
    if (team.rank() == 0) close(batch());
    team.wait();
  }

  FLASHPO_TEAM double above_baseline(double x, const Group& g) {
    const double d = (x - g.centre - g.offset) * g.factor;
    return p.baseline == SECOND_BEST && d < 0 ? 0 : d;
  }

  FLASHPO_TEAM void write(int64_t row, double advantage, double mean, double std) {
    bool degenerate = true;
    for (int64_t c = 0; c < p.columns(); ++c) degenerate = degenerate && !(range(groups_of(row)[c]) > 0);
    p.advantage[row] = static_cast<float>(advantage);
    p.mean[row] = static_cast<float>(mean);
    p.std[row] = static_cast<float>(std);
    p.degenerate[row] = degenerate;
  }

  FLASHPO_TEAM void sum_then_normalize() {
    if (p.scale == BATCH) gather_batch(p.lengths);
    each_row([&](int64_t row) {
      const Group& g = *groups_of(row);
      const double x = p.advantage[row], std = p.scale == BATCH ? batch().std : g.std;
      if (std::isnan(x)) return write(row, 0, g.centre + g.offset, std);
      const double d = above_baseline(x, g);
      write(row, p.scale == UNSCALED ? d : scaled(d, std, p.eps), x - d, std);
    });
  }

  FLASHPO_TEAM void normalize_then_sum() {
    each_row([&](int64_t row) {
      double sum = 0;
      if (std::isnan(p.advantage[row])) return;
      for (int64_t k = 0; k < p.functions; ++k) {
        const float x = p.rewards[row * p.functions + k];
        const Group& g = groups_of(row)[k];
        if (!std::isnan(x)) sum += p.reward_weights[k] * scaled(above_baseline(x, g), g.std, p.eps);
      }
      p.advantage[row] = static_cast<float>(sum);
    });
    gather_batch(p.lengths);
    each_row([&](int64_t row) {
      const Group& all = batch();
      const double x = p.advantage[row];
      if (p.lengths) {  // verl: the mean over tokens
        const double d = std::isnan(x) ? 0 : above_baseline(x, all);
        write(row, d / std::sqrt(all.std * all.std + WHITENING_EPS), all.centre + all.offset, all.std);
      } else {  // TRL: the mean over rows, which is 0 because every column of every group has the mean 0
        write(row, std::isnan(x) ? 0 : scaled(x, all.std, p.eps), 0, all.std);
      }
    });
  }

  FLASHPO_TEAM void operator()() {
    for (int64_t slot = team.rank(); slot < p.capacity; slot += team.size()) p.table[slot] = FREE;
    if (team.rank() == 0) batch() = Group{};
    team.wait();
    each_row([&](int64_t row) {
      p.advantage[row] = combined(row);
      find_group(row);
    });
    const auto value = [&](int64_t row, int64_t c) {
      return p.normalize_first ? p.rewards[row * p.functions + c] : p.advantage[row];
    };
    const auto where = [&](int64_t row) { return groups_of(row); };
    gather(p.columns(), value, where, p.normalize_first ? nullptr : p.lengths);
    each_row([&](int64_t row) {
      if (p.id[row] == row)
        for (int64_t c = 0; c < p.columns(); ++c) close(groups_of(row)[c], p);
    });
    if (p.normalize_first) normalize_then_sum();
    else sum_then_normalize();
  }
};

}  // namespace flashpo::advantages
