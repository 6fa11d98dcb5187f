// Work of a CPU twin shared among the threads of OpenMP, which are torch's own.
#pragma once
#include <algorithm>
#include <cstdint>

namespace forebay {

constexpr int64_t kMaxLine = 32768;            // floats of a row that a twin keeps on its stack
constexpr int64_t kBytesWorthAThread = 65536;  // below, waking a thread costs more than it gives

// work(begin, end) for stretches that together are [0, count); `bytes_each` of input per item.
template <class Work>
void parallel_for(int64_t count, int64_t bytes_each, int32_t num_threads, Work work) {
  const int64_t worth = count * bytes_each / kBytesWorthAThread;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>({num_threads, worth, count})));
  if (threads == 1) {
    if (count > 0) work(int64_t(0), count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) work(count * i / threads, count * (i + 1) / threads);
}

}  // namespace forebay
