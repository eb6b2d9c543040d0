#include "lagrangian.h"

#include <cmath>
#include <utility>

namespace mdkv {
namespace {

constexpr int kBisections = 40;
constexpr int kPassesPerSift = 4;

// Tokens side by side, a row of losses per option.
struct Tokens {
  std::vector<float> losses;  // [options, count]
  int64_t count;
};

double pages_of(const LayerLosses& layer, const Counts& counts) {
  double pages = 0.0;
  for (int o = 0; o < layer.options; ++o) {
    pages += static_cast<double>(counts[o]) * layer.cost(o);
  }
  return pages;
}

// Every token's option of least priced loss, the first among equals, and that least.
class Cheapest {
 public:
  void find(const LayerLosses& layer, const float* losses, int64_t count, double price) {
    least_.resize(count);
    option_.assign(count, 0);
    const double base = price * layer.cost(0);
    for (int64_t i = 0; i < count; ++i) least_[i] = losses[i] + base;
    for (int o = 1; o < layer.options; ++o) {
      const float* row = losses + o * count;
      const double offset = price * layer.cost(o);
      for (int64_t i = 0; i < count; ++i) {
        const double priced = row[i] + offset;
        const bool better = priced < least_[i];
        option_[i] = better ? o : option_[i];
        least_[i] = better ? priced : least_[i];
      }
    }
  }

  Counts counts() const {
    Counts counts{};
    for (const int64_t option : option_) ++counts[option];
    return counts;
  }

  const std::vector<double>& least() const { return least_; }
  const std::vector<int64_t>& option() const { return option_; }

 private:
  std::vector<double> least_;
  std::vector<int64_t> option_;
};

// Keeps the tokens whose option differs between two prices, and counts the others. A token's
// option only gets cheaper as the price rises: one that is the same at both is so between.
void sift(const LayerLosses& layer, double low, double high, Tokens& tokens, Counts& settled) {
  Cheapest at_low, at_high;
  at_low.find(layer, tokens.losses.data(), tokens.count, low);
  at_high.find(layer, tokens.losses.data(), tokens.count, high);
  std::vector<int64_t> open;
  for (int64_t i = 0; i < tokens.count; ++i) {
    if (at_low.option()[i] == at_high.option()[i]) {
      ++settled[at_low.option()[i]];
    } else {
      open.push_back(i);
    }
  }
  const int64_t count = static_cast<int64_t>(open.size());
  std::vector<float> kept(layer.options * count);
  for (int o = 0; o < layer.options; ++o) {
    for (int64_t i = 0; i < count; ++i) {
      kept[o * count + i] = tokens.losses[o * tokens.count + open[i]];
    }
  }
  tokens = {std::move(kept), count};
}

// Prices per page next to each other; only at the second do the pages suffice.
std::pair<double, double> bisect_price(const LayerLosses& layer, int64_t num_pages) {
  Tokens tokens{{layer.data, layer.data + layer.options * layer.stride()}, layer.stride()};
  Counts settled{};
  Cheapest cheapest;
  const auto asks_too_much = [&](double price) {
    cheapest.find(layer, tokens.losses.data(), tokens.count, price);
    Counts counts = cheapest.counts();
    for (int o = 0; o < layer.options; ++o) counts[o] += settled[o];
    return pages_of(layer, counts) > static_cast<double>(num_pages);
  };
  if (!asks_too_much(0.0)) return {0.0, 0.0};
  double least_cost = 1.0;
  for (int o = 0; o < layer.options; ++o) {
    if (layer.capacity[o] > 0) least_cost = std::min(least_cost, layer.cost(o));
  }
  const float largest = *std::max_element(tokens.losses.begin(), tokens.losses.end());
  double high = largest / least_cost + 1e-30, low = high * 1e-12;
  for (int i = 0; i < kBisections; ++i) {
    const double middle = std::sqrt(low * high);
    (asks_too_much(middle) ? low : high) = middle;
    if (i % kPassesPerSift == kPassesPerSift - 1) sift(layer, low, high, tokens, settled);
  }
  return {low, high};
}

}  // namespace

Lagrangian solve_lagrangian(const LayerLosses& layer, int64_t num_pages) {
  const int64_t tokens = layer.stride();
  Lagrangian result{std::vector<uint8_t>(tokens), std::vector<Counts>(layer.heads), 0.0};
  const auto [low, high] = bisect_price(layer, num_pages);
  Cheapest cheapest, richer;
  cheapest.find(layer, layer.data, tokens, high);
  richer.find(layer, layer.data, tokens, low);
  for (const double least : cheapest.least()) result.lower_bound += least;
  result.lower_bound -= high * static_cast<double>(num_pages);
  const double left = static_cast<double>(num_pages) - pages_of(layer, cheapest.counts());
  double more = 0.0;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t option = cheapest.option()[i], next = richer.option()[i];
    more += layer.cost(static_cast<int>(next)) - layer.cost(static_cast<int>(option));
    result.option[i] = static_cast<uint8_t>(option);
    ++result.wanted[i / layer.span][more <= left ? next : option];
  }
  return result;
}

}  // namespace mdkv
