// The allocate operator: which format each token of a layer gets, in whole pages;
// mdkv_vllm/core/allocate.py is the specification.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <map>
#include <optional>
#include <tuple>

#include "lagrangian.h"

namespace mdkv {
namespace {

constexpr int64_t kBoxPoints = 128;  // most choices of pages tried per head

struct Filling {
  double loss;
  Counts counts;
};
// Least loss by the number of pages a head takes.
using Table = std::map<int64_t, Filling>;

// The choices of whole pages tried around a head's Lagrangian solution.
class Box {
 public:
  explicit Box(const LayerLosses& losses) : losses_(losses) {
    const int lists = losses.options - 1;
    int64_t width = 2;
    for (const int64_t wide : {3, 4}) {
      if (std::pow(wide, lists) <= kBoxPoints) width = wide;
    }
    below_ = width > 2 ? 1 : 0;
    const int varied = static_cast<int>(std::log(kBoxPoints) / std::log(width));
    for (int o = 1; o < losses.options; ++o) widths_[o] = losses.options - o <= varied ? width : 1;
  }

  // Least pages of each list.
  Counts corner(const Counts& wanted) const {
    Counts pages{};
    for (int o = 1; o < losses_.options; ++o) pages[o] = wanted[o] / losses_.capacity[o] - below_;
    return pages;
  }

  Table table(Exchange& filling, const Counts& corner) const {
    Table table;
    Counts pages = corner, way;
    way.fill(1);
    for (bool more = true; more; more = step(corner, pages, way)) {
      const Counts counts = fill_up(pages);
      filling.move_to(counts);
      const auto [entry, added] =
          table.try_emplace(pages_of(counts), Filling{filling.objective(), counts});
      if (!added && filling.objective() < entry->second.loss) {
        entry->second = {filling.objective(), counts};
      }
    }
    return table;
  }

 private:
  // To a neighbouring point not yet seen, the richest list varying fastest.
  bool step(const Counts& corner, Counts& pages, Counts& way) const {
    for (int o = losses_.options - 1; o > 0; --o) {
      const int64_t next = pages[o] + way[o];
      if (next >= corner[o] && next < corner[o] + widths_[o]) {
        pages[o] = next;
        return true;
      }
      way[o] = -way[o];
    }
    return false;
  }

  // Tokens per option when lists are filled up, the richest first.
  Counts fill_up(const Counts& pages) const {
    Counts counts{};
    int64_t rest = losses_.span;
    for (int o = losses_.options - 1; o > 0; --o) {
      counts[o] = std::min(pages[o] * losses_.capacity[o], rest);
      rest -= counts[o];
    }
    counts[0] = rest;
    return counts;
  }

  int64_t pages_of(const Counts& counts) const {
    int64_t pages = 0;
    for (int o = 0; o < losses_.options; ++o) {
      const int64_t capacity = losses_.capacity[o];
      if (capacity > 0) pages += (counts[o] + capacity - 1) / capacity;
    }
    return pages;
  }

  const LayerLosses& losses_;
  Counts widths_{};
  int64_t below_;
};

struct Share {
  double loss = 0.0;
  std::vector<Counts> chosen;
};

// Tokens per head and option with the least summed loss; nothing where no choice fits.
// Equal losses go to the choice of more pages.
std::optional<std::vector<Counts>> share_pages(const std::vector<Table>& tables,
                                               int64_t num_pages) {
  std::map<int64_t, Share> shares{{0, {}}};
  for (const Table& table : tables) {
    std::map<int64_t, Share> grown;
    for (const auto& [taken, share] : shares) {
      for (const auto& [pages, filling] : table) {
        if (taken + pages > num_pages) break;
        const double loss = share.loss + filling.loss;
        const auto [entry, added] = grown.try_emplace(taken + pages);
        if (!added && loss >= entry->second.loss) continue;
        entry->second = {loss, share.chosen};
        entry->second.chosen.push_back(filling.counts);
      }
    }
    shares = std::move(grown);
  }
  const Share* best = nullptr;
  for (const auto& [pages, share] : shares) {
    if (best == nullptr || share.loss <= best->loss) best = &share;
  }
  if (best == nullptr) return std::nullopt;
  return best->chosen;
}

std::vector<Exchange> fill(const LayerLosses& losses, const Lagrangian& start, int64_t num_pages) {
  std::vector<Exchange> fillings;
  std::vector<Counts> corners;
  const Box box(losses);
  for (int64_t h = 0; h < losses.heads; ++h) {
    fillings.emplace_back(losses.data + h * losses.span, losses.stride(), losses.options,
                          losses.span, start.option.data() + h * losses.span);
    corners.push_back(box.corner(start.wanted[h]));
  }
  std::vector<Table> tables(losses.heads);
  std::optional<std::vector<Counts>> best;
  while (!best) {
    at::parallel_for(0, losses.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        for (int64_t& pages : corners[h]) pages = std::max<int64_t>(pages, 0);
        tables[h] = box.table(fillings[h], corners[h]);
        for (int64_t& pages : corners[h]) --pages;
      }
    });
    best = share_pages(tables, num_pages);
  }
  for (int64_t h = 0; h < losses.heads; ++h) fillings[h].move_to((*best)[h]);
  return fillings;
}

// losses: float32 [options, heads, span]. tokens_per_page: int64 [formats].
// Returns choice int64 [heads, span] (-1 for drop), tokens int64 [heads, formats], the summed loss
// and the dual's bound on it.
std::tuple<at::Tensor, at::Tensor, double, double> allocate(const at::Tensor& losses,
                                                            const at::Tensor& tokens_per_page,
                                                            bool drop, int64_t num_pages) {
  TORCH_CHECK(losses.scalar_type() == at::kFloat && losses.dim() == 3 && losses.is_contiguous(),
              "losses: expected contiguous float32 [options, heads, span], got ",
              losses.scalar_type(), " ", losses.sizes());
  const int64_t formats = losses.size(0) - drop;
  TORCH_CHECK(tokens_per_page.scalar_type() == at::kLong && tokens_per_page.is_contiguous() &&
                  tokens_per_page.dim() == 1 && tokens_per_page.size(0) == formats && formats > 0 &&
                  losses.size(0) <= kMaxOptions,
              "tokens_per_page: expected contiguous int64 [", formats, "] of at most ",
              kMaxOptions - 1, ", got ", tokens_per_page.scalar_type(), " ",
              tokens_per_page.sizes());
  LayerLosses layer{losses.const_data_ptr<float>(),
                    static_cast<int>(losses.size(0)),
                    losses.size(1),
                    losses.size(2),
                    {}};
  for (int64_t f = 0; f < formats; ++f) {
    layer.capacity[f + drop] = tokens_per_page.const_data_ptr<int64_t>()[f];
    TORCH_CHECK(layer.capacity[f + drop] > 0, "tokens_per_page: must be positive");
  }
  const int64_t least =
      drop ? 0 : layer.heads * ((layer.span + layer.capacity[0] - 1) / layer.capacity[0]);
  TORCH_CHECK_VALUE(least <= num_pages, num_pages, " pages cannot hold ", layer.span,
                    " tokens without dropping any");
  const Lagrangian start = solve_lagrangian(layer, num_pages);
  const std::vector<Exchange> fillings = fill(layer, start, num_pages);
  at::Tensor choice = at::empty({layer.heads, layer.span}, at::kLong);
  at::Tensor tokens = at::empty({layer.heads, formats}, at::kLong);
  double objective = 0.0;
  for (int64_t h = 0; h < layer.heads; ++h) {
    int64_t* row = choice.data_ptr<int64_t>() + h * layer.span;
    for (int64_t t = 0; t < layer.span; ++t) {
      const int option = fillings[h].option()[t];
      row[t] = option - int64_t{drop};
      objective += layer.data[option * layer.stride() + h * layer.span + t];
    }
    for (int64_t f = 0; f < formats; ++f) {
      tokens.data_ptr<int64_t>()[h * formats + f] = fillings[h].counts()[f + drop];
    }
  }
  return {choice, tokens, objective, start.lower_bound};
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("allocate", &allocate); }

}  // namespace mdkv
