// group_advantages for the CPU and for a block of CUDA threads: what a team of threads does with B rows.
//
// The team goes over the rows a few times and waits for all its threads after each pass. A hash table of row numbers
// (open addressing) finds the groups; the row in the table represents its group. Sums over a group are computed in
// fixed point, relative to the group's smallest reward and to its range. Integer additions commute, so the result
// depends neither on the order of the threads nor on that of the rows, and equal rewards give exactly 0.
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
constexpr int32_t FREE = -1;                   // a slot of the table that has no row
constexpr double ONE = 1152921504606846976.0;  // 2^60: the fixed-point form of 1
constexpr double WHITENING_EPS = 1e-8;         // verl's masked_whiten adds it to the variance
constexpr const char* FINITE = "rewards must be finite, or NaN where there is none; so must their weighted sum";

enum Baseline { MEAN, LEAVE_ONE_OUT, SECOND_BEST, NONE };  // in the order of BASELINES in Python
enum Scale { GROUP, BATCH, UNSCALED };                     // in the order of SCALES in Python

// The statistics of the scorable rewards of one group, or of the whole batch.
struct Group {
  // The number of rows, and the sum of their lengths (without lengths, also the number of rows)
  int64_t count = 0, weight = 0;
  int32_t low = INT32_MAX, high = INT32_MIN;  // the smallest and the largest, as `ordered`
  int32_t second = INT32_MIN, at_high = 0;    // the largest below `high`, and how many rows have `high`
  int64_t sum = 0, squares = 0;               // means of t = (x - low) / width and of (t - mean)^2, as numbers of 2^-60
  double width = 0, per_width = 0, per_weight = 0;
  double centre = 0, offset = 0, factor = 1;  // x - baseline = (x - centre - offset) factor
  double std = 0, gain = 0;                   // the advantage is (x - baseline) gain
};

struct Problem {
  int64_t rows, functions;
  const float* rewards;    // (rows, functions)
  const int64_t* group;    // (rows)
  const int64_t* lengths;  // (rows), or nullptr
  double reward_weights[MAX_FUNCTIONS];
  Baseline baseline;
  Scale scale;
  double eps;
  bool raw_singletons;  // a group with one scorable reward has that reward as its advantage
  float *advantage, *mean, *std;
  bool* degenerate;
  // scratch
  int64_t capacity;  // a power of two
  Group* batch;      // one
  Group* groups;     // (rows, columns), of which the first `found` are used
  int32_t* found;    // one: the number of groups
  int32_t* id;       // (rows): the number of the row's group; before that is known, a row that represents the group
  int32_t* number;   // (rows): the number of the group that this row represents, if it represents one
  int32_t* table;    // (capacity)
};

// Floats as integers of the same order, because atomic minimum and maximum exist for integers only.
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

FLASHPO_TEAM inline int64_t fixed_point(double x) { return static_cast<int64_t>(x * ONE); }

// Keys are often regular (prompt << 32 | turn), so every bit of the result must depend on all bits of the key
// (splitmix64).
FLASHPO_TEAM inline uint64_t hash(uint64_t key) {
  key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
  key = (key ^ key >> 27) * 0x94d049bb133111eb;
  return key ^ key >> 31;
}

// From the extremes, set the numbers relative to which the sums are taken.
FLASHPO_TEAM inline void open(Group& g, bool weighted) {
  if (g.count == 0) return;
  if (!weighted) g.weight = g.count;
  g.centre = unordered(g.low);
  g.width = unordered(g.high) - g.centre;
  g.per_width = g.width > 0 ? 1 / g.width : 0;
  g.per_weight = 1 / static_cast<double>(g.weight);
}

// From the sums, compute mean and standard deviation (ddof 1).
FLASHPO_TEAM inline void close(Group& g, double eps) {
  const double weight = static_cast<double>(g.weight);
  g.offset = g.width * (g.sum / ONE);
  g.std = g.weight > 1 ? g.width * std::sqrt(g.squares / ONE * (weight / (weight - 1))) : 0;
  if (g.count == 0) g.centre = g.std = NAN;
  g.gain = g.std > 0 ? 1 / (g.std + eps) : 0;
}

// Then compute the baseline for which the problem asks.
FLASHPO_TEAM inline void close(Group& g, const Problem& p) {
  close(g, p.eps);
  const bool alone = g.count == 1;
  if (p.baseline == SECOND_BEST && g.count > 0) {
    g.centre = unordered(alone || g.at_high > 1 ? g.high : g.second);
    g.offset = 0;
  } else if (alone && p.raw_singletons) {
    g.centre = g.offset = 0;
    g.std = 1;
    g.gain = 1 / (1 + p.eps);
  } else if (p.baseline == NONE) {
    g.centre = g.offset = 0;
  } else if (p.baseline == LEAVE_ONE_OUT && g.count > 1) {
    g.factor = static_cast<double>(g.count) / static_cast<double>(g.count - 1);
  }
}

// The rows grouped by key, with a Group for every column.
template <bool MANY>
struct ByKey {
  const Problem& p;
  FLASHPO_TEAM int64_t columns() const { return MANY ? p.functions : 1; }
  FLASHPO_TEAM Group* of(int64_t row) const { return (*this)[p.id[row]]; }
  FLASHPO_TEAM int64_t size() const { return *p.found; }
  FLASHPO_TEAM Group* operator[](int64_t i) const { return p.groups + i * columns(); }
};

// All rows as one group.
struct Whole {
  Group* batch;
  FLASHPO_TEAM int64_t columns() const { return 1; }
  FLASHPO_TEAM Group* of(int64_t) const { return batch; }
  FLASHPO_TEAM int64_t size() const { return 1; }
  FLASHPO_TEAM Group* operator[](int64_t) const { return batch; }
};

// NORMALIZE_FIRST: normalise each function by itself, then sum (GDPO); then the columns are the functions. Otherwise
// the only column is their sum.
template <class Team, bool NORMALIZE_FIRST>
struct Run {
  const Problem& p;
  Team team;

  template <class F>
  FLASHPO_TEAM void each(int64_t n, F f) {
    const int64_t step = team.size();
    for (int64_t i = team.rank(); i < n; i += step) f(i);
    team.wait();
  }
  template <class F>
  FLASHPO_TEAM void each_row(F f) {
    each(p.rows, f);
  }
  template <class In, class F>
  FLASHPO_TEAM void each_group(In in, F f) {
    each(in.size(), [&](int64_t i) {
      for (int64_t c = 0; c < in.columns(); ++c) f(in[i][c]);
    });
  }

  FLASHPO_TEAM ByKey<NORMALIZE_FIRST> by_key() { return {p}; }
  FLASHPO_TEAM Whole whole() { return {p.batch}; }

  // The weighted sum over the functions that scored the row, rounded once; NaN if none did.
  FLASHPO_TEAM float combined(int64_t row) {
    double sum = 0;
    bool scored = false;
    for (int64_t k = 0; k < p.functions; ++k) {
      const float x = p.rewards[row * p.functions + k];
      if (std::isnan(x)) continue;
      sum += x * p.reward_weights[k];
      scored = true;
    }
    if (!scored) return NAN;
    team.require(std::isfinite(static_cast<float>(sum)), FINITE);
    return static_cast<float>(sum);
  }

  FLASHPO_TEAM void find_group(int64_t row) {
    const int32_t mine = static_cast<int32_t>(row);
    const int64_t key = p.group[row];
    if (Team::IN_ORDER && row > 0 && p.group[row - 1] == key) {  // rows of a group are mostly adjacent
      p.id[row] = p.id[row - 1];
      return;
    }
    for (uint64_t slot = hash(key);; ++slot) {
      const int32_t other = team.claim(&p.table[slot & (p.capacity - 1)], mine);
      if (other == FREE) {
        p.id[row] = mine;
        p.number[row] = team.count(p.found);
        for (int64_t c = 0; c < by_key().columns(); ++c) by_key()[p.number[row]][c] = Group{};
        return;
      }
      if (p.group[other] == key) {
        p.id[row] = other;
        return;
      }
    }
  }

  // Compute count, extremes, mean and squared deviations of value(row, column) in each group.
  template <class In, class Value>
  FLASHPO_TEAM void gather(In in, Value value, const int64_t* lengths) {
    const auto weight = [&](int64_t row) { return lengths ? lengths[row] : 1; };
    const auto each_scorable = [&](auto f) {
      each_row([&](int64_t row) {
        for (int64_t c = 0; c < in.columns(); ++c)
          if (const float x = value(row, c); !std::isnan(x)) f(row, x, in.of(row)[c]);
      });
    };
    each_scorable([&](int64_t row, float x, Group& g) {
      team.add(&g.count, int64_t{1});
      if (lengths) team.add(&g.weight, lengths[row]);
      team.lower(&g.low, ordered(x));
      team.raise(&g.high, ordered(x));
    });
    each_group(in, [&](Group& g) { open(g, lengths != nullptr); });
    each_scorable([&](int64_t row, float x, Group& g) {
      team.add(&g.sum, fixed_point((x - g.centre) * g.per_width * weight(row) * g.per_weight));
    });
    each_scorable([&](int64_t row, float x, Group& g) {
      const double d = (x - g.centre) * g.per_width - g.sum / ONE;
      team.add(&g.squares, fixed_point(d * d * weight(row) * g.per_weight));
    });
    if (p.baseline == SECOND_BEST)
      each_scorable([&](int64_t, float x, Group& g) {
        if (ordered(x) == g.high) team.add(&g.at_high, int32_t{1});
        else team.raise(&g.second, ordered(x));
      });
  }

  // The same over all rows, for the values in `advantage`.
  FLASHPO_TEAM const Group& gather_batch() {
    gather(whole(), [&](int64_t row, int64_t) { return p.advantage[row]; }, p.lengths);
    each_group(whole(), [&](Group& g) { close(g, p.eps); });
    return *p.batch;
  }

  FLASHPO_TEAM double above_baseline(double x, const Group& g) {
    const double d = (x - g.centre - g.offset) * g.factor;
    return p.baseline == SECOND_BEST && d < 0 ? 0 : d;
  }

  FLASHPO_TEAM void write(int64_t row, double advantage, double mean, double std) {
    bool varies = false;
    for (int64_t c = 0; c < by_key().columns(); ++c) varies = varies || by_key().of(row)[c].width > 0;
    p.advantage[row] = static_cast<float>(advantage);
    p.mean[row] = static_cast<float>(mean);
    p.std[row] = static_cast<float>(std);
    p.degenerate[row] = !varies;
  }

  FLASHPO_TEAM void sum_then_normalize() {
    const Group* batch = p.scale == BATCH ? &gather_batch() : nullptr;
    each_row([&](int64_t row) {
      const Group& g = *by_key().of(row);
      const Group& scale = batch ? *batch : g;
      const double x = p.advantage[row];
      if (std::isnan(x)) return write(row, 0, g.centre + g.offset, scale.std);
      const double d = above_baseline(x, g);
      write(row, p.scale == UNSCALED ? d : d * scale.gain, x - d, scale.std);
    });
  }

  FLASHPO_TEAM void normalize_then_sum() {
    each_row([&](int64_t row) {
      double sum = 0;
      for (int64_t k = 0; k < p.functions; ++k) {
        const float x = p.rewards[row * p.functions + k];
        const Group& g = by_key().of(row)[k];
        if (!std::isnan(x)) sum += p.reward_weights[k] * above_baseline(x, g) * g.gain;
      }
      if (!std::isnan(p.advantage[row])) p.advantage[row] = static_cast<float>(sum);
    });
    const Group& all = gather_batch();
    each_row([&](int64_t row) {
      const double x = p.advantage[row];
      const bool scorable = !std::isnan(x);
      if (p.lengths) {  // verl: the mean over tokens
        const double d = scorable ? above_baseline(x, all) : 0;
        write(row, d / std::sqrt(all.std * all.std + WHITENING_EPS), all.centre + all.offset, all.std);
      } else {  // TRL: the mean over rows, which is 0 because every column of every group has the mean 0
        write(row, scorable ? x * all.gain : 0, 0, all.std);
      }
    });
  }

  FLASHPO_TEAM void operator()() {
    if (team.rank() == 0) {
      *p.found = 0;
      *p.batch = Group{};
    }
    each(p.capacity, [&](int64_t slot) { p.table[slot] = FREE; });
    each_row([&](int64_t row) {
      if (p.lengths) team.require(p.lengths[row] > 0, "lengths must be positive");
      p.advantage[row] = combined(row);
      find_group(row);
    });
    each_row([&](int64_t row) { p.id[row] = p.number[p.id[row]]; });
    const auto value = [&](int64_t row, int64_t c) {
      return NORMALIZE_FIRST ? p.rewards[row * p.functions + c] : p.advantage[row];
    };
    gather(by_key(), value, NORMALIZE_FIRST ? nullptr : p.lengths);
    each_group(by_key(), [&](Group& g) { close(g, p); });
    if constexpr (NORMALIZE_FIRST) normalize_then_sum();
    else sum_then_normalize();
  }
};

}  // namespace flashpo::advantages
