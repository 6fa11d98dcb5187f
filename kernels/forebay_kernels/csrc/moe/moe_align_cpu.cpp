// The CPU's stable counting sort of choices by expert.
#include <algorithm>

#include "params.h"

namespace forebay {
namespace {

constexpr int kMaxExperts = 4096;

}  // namespace
}  // namespace forebay

extern "C" int forebay_moe_align(const MoeAlignParams* params, void*) {
  using namespace forebay;
  const MoeAlignParams& p = *params;
  if (p.num_experts <= 0 || p.multiple <= 0 || p.slots > 0x7fffffff) return FOREBAY_INVALID;
  if (p.num_experts > kMaxExperts) return FOREBAY_UNSUPPORTED;
  const int32_t* ids = static_cast<const int32_t*>(p.ids);
  int32_t* order = static_cast<int32_t*>(p.order);
  int32_t* offsets = static_cast<int32_t*>(p.offsets);
  int32_t* inverse = static_cast<int32_t*>(p.inverse);
  const auto is_expert = [&](int32_t id) { return id >= 0 && id < p.num_experts; };

  int32_t next[kMaxExperts] = {};
  for (int64_t i = 0; i < p.choices; ++i)
    if (is_expert(ids[i])) ++next[ids[i]];
  int32_t row = 0;
  for (int expert = 0; expert < p.num_experts; ++expert) {
    const int32_t count = next[expert];
    offsets[expert] = next[expert] = row;
    row += (count + p.multiple - 1) / p.multiple * p.multiple;
  }
  offsets[p.num_experts] = row;
  std::fill_n(order, p.slots, -1);
  for (int64_t i = 0; i < p.choices; ++i) {
    inverse[i] = is_expert(ids[i]) ? next[ids[i]]++ : -1;
    if (inverse[i] >= 0) order[inverse[i]] = int32_t(i);
  }
  return FOREBAY_OK;
}
