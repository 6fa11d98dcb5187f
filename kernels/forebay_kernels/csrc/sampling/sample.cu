// sample on a GPU: four kernels, none of which waits for the host.
//
//   survey   the largest logit of every row, and whether the row has a NaN or +inf
//   count    a histogram of exponents                       (rows with top-k or top-p)
//   weigh    sums of weights, one per stretch of 2,048 ids; candidates at the cuts go to a list
//   draw     cuts among the candidates, adds up, draws; a warp a draw
//
// A row is spread over blocks of 32,768 ids, a warp a stretch: at 64 rows of 131,072 ids that is
// 256 blocks, two on each multiprocessor, and one row alone still has four. A kernel's end is the
// only barrier that a row's blocks need, so any device can run this. The row is read three times
// and no more: the first time from memory, then (64 fp32 rows of 131,072 ids are 34 MB) mostly
// from a large second-level cache. Histograms over the whole row hold 32-bit counts, the one kind
// of shared-memory atomic that is fast; the counts bracket the cuts so closely that a few hundred
// to a few thousand ids remain candidates, and only these are searched exactly, with masses. When
// they do not fit their list (a row of equal logits, say) the last kernel searches the whole row.
#include "sampling/pick.cuh"
#include "sampling/survey.cuh"
#include "sampling/weigh.cuh"

namespace forebay {
namespace {

template <class T>
int start(const SampleParams& p, void* stream) {
  const unsigned parts = unsigned((p.vocab + kStretch * kWarps - 1) / (kStretch * kWarps));
  for (int64_t first = 0; first < p.draws; first += FOREBAY_SAMPLE_DRAWS) {
    const int64_t left = p.draws - first;
    const int64_t count = left < FOREBAY_SAMPLE_DRAWS ? left : FOREBAY_SAMPLE_DRAWS;
    const dim3 grid(parts, unsigned(count));
    int status = launch(&survey_kernel<T>, grid, dim3(kThreads), 0, stream, p, first);
    if (status == FOREBAY_OK)
      status = launch(&count_kernel<T>, grid, dim3(kThreads), 0, stream, p, first);
    if (status == FOREBAY_OK)
      status = launch(&weigh_kernel<T>, grid, dim3(kThreads), 0, stream, p, first);
    if (status == FOREBAY_OK)
      status = launch(&draw_kernel<T>, dim3(unsigned(count)), dim3(kThreads), 0, stream, p, first,
                      first + count);
    if (status != FOREBAY_OK) return status;
  }
  return FOREBAY_OK;
}

}  // namespace
}  // namespace forebay

extern "C" int forebay_sample(const SampleParams* params, void* stream) {
  using namespace forebay;
  const SampleParams& p = *params;
  if (p.draws == 0) return FOREBAY_OK;
  if (p.vocab < 1 || p.vocab > FOREBAY_SAMPLE_VOCAB) return FOREBAY_UNSUPPORTED;
  switch (p.dtype) {
    case FOREBAY_F32:
      return start<float>(p, stream);
    case FOREBAY_BF16:
      return start<bf16>(p, stream);
    default:
      return FOREBAY_UNSUPPORTED;
  }
}
