// Threads that share a loop. A worker that the system does not run is not waited for: whoever is awake takes its share.
#pragma once
#include <pthread.h>
#include <unistd.h>

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
        Loop loop{&body, count, grain, threads - 1};
        {
            std::lock_guard<std::mutex> hold(state_);
            loop_ = &loop;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        loop.take();
        {
            std::lock_guard<std::mutex> hold(state_);
            loop_ = nullptr;  // from here on nobody joins
        }
        while (loop.inside.load(std::memory_order_acquire)) relax();
    }

  private:
    struct Loop {
        const std::function<void(int64_t, int64_t)>* body;
        int64_t count, grain;
        int helpers;
        std::atomic<int64_t> next{0};
        std::atomic<int> inside{0};

        void take() {
            for (int64_t begin; (begin = next.fetch_add(grain)) < count;)
                (*body)(begin, begin + grain < count ? begin + grain : count);
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
                loop = loop_ && index < loop_->helpers ? loop_ : nullptr;
                if (loop) loop->inside.fetch_add(1, std::memory_order_relaxed);
            }
            if (!loop) continue;
            loop->take();
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
