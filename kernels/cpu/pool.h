// Threads that share a loop. Each has a stretch of its own, which it takes piece by piece, so that it reads memory in
// order; who has finished takes pieces of the others'. A worker that the system does not run is thus not waited for.
#pragma once
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace int4 {

class Pool {
  public:
    // Call body(begin, end) for pieces of [0, count) of `grain` each, on `threads` threads, this one included.
    void run(int threads, int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
        if (threads <= 1 || count <= grain) return body(0, count);
        std::lock_guard<std::mutex> one_at_a_time(callers_);
        while (int(workers_.size()) < threads - 1) {
            workers_.emplace_back([this, index = int(workers_.size())] { work(index); });
            workers_.back().detach();
        }
        Loop loop(body, count, grain, threads);
        {
            std::lock_guard<std::mutex> hold(state_);
            loop_ = &loop;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        loop.take(0);
        {
            std::lock_guard<std::mutex> hold(state_);
            loop_ = nullptr;  // from here on nobody joins
        }
        while (loop.inside.load(std::memory_order_acquire)) relax();
    }

  private:
    struct Loop {
        static constexpr int kMostStretches = 64;

        const std::function<void(int64_t, int64_t)>& body;
        const int64_t count, grain;
        const int threads, stretches;
        std::atomic<int64_t> next[kMostStretches];
        std::atomic<int> inside{0};

        Loop(const std::function<void(int64_t, int64_t)>& body, int64_t count, int64_t grain, int threads)
            : body(body), count(count), grain(grain), threads(threads), stretches(std::min(threads, kMostStretches)) {
            for (int i = 0; i < stretches; ++i) next[i] = start(i);
        }

        int64_t start(int stretch) const {
            const int64_t pieces = (count + grain - 1) / grain;
            return std::min(pieces * stretch / stretches * grain, count);
        }

        void take(int thread) {
            for (int i = 0; i < stretches; ++i) {
                const int stretch = (thread + i) % stretches;
                const int64_t end = start(stretch + 1);
                for (int64_t begin; (begin = next[stretch].fetch_add(grain)) < end;)
                    body(begin, std::min(begin + grain, end));
            }
        }
    };

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    void work(int index) {
        uint64_t seen = 0;
        for (;;) {
            // The layers of a model follow each other within microseconds: look a little while before sleeping.
            for (int spin = 0; spin < 2000 && epoch_.load(std::memory_order_acquire) == seen; ++spin) relax();
            Loop* loop;
            {
                std::unique_lock<std::mutex> hold(state_);
                wake_.wait(hold, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
                seen = epoch_.load(std::memory_order_relaxed);
                loop = loop_ && index < loop_->threads - 1 ? loop_ : nullptr;
                if (loop) loop->inside.fetch_add(1, std::memory_order_relaxed);
            }
            if (!loop) continue;
            loop->take(index + 1);
            loop->inside.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex callers_, state_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    Loop* loop_ = nullptr;
    std::vector<std::thread> workers_;
};

// The pool of this process. A forked child has none of its parent's threads and starts with a pool of its own.
inline Pool& pool() {
    static std::atomic<Pool*> current{new Pool};
    static int registered = pthread_atfork(nullptr, nullptr, [] { current.store(new Pool); });
    (void)registered;
    return *current.load();
}

}  // namespace int4
