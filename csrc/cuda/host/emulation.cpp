// The scheduler behind emulation.h: fibers, barriers, and the order in which threads take turns.
#include "emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

Thread* thread;
Block block;

namespace {

constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 99 * 1024;  // of a block, where there is least
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 32 * 1024 + 320;  // no power of two: the tops of all stacks would share cache lines
#endif

enum class State { ready, at_warp, at_block, returned };

struct Copy {
  void* shared;
  const void* global;
  size_t bytes, zeros;
  unsigned group;
};

struct Fiber : Thread {
#if defined(__x86_64__)
  void* top;  // of its stack, where its registers are saved
#else
  ucontext_t context;
#endif
  char* stack;
  State state;
  Operation operation;
  void* brought;
  std::vector<Copy> copies;  // under way
  unsigned committed;        // groups of them
};

enum class Order { forward, reversed, random };
Order order = Order::forward;
std::minstd_rand dice;

std::vector<Fiber> fibers(kMostThreads);
std::unique_ptr<char, decltype(&std::free)> arena(nullptr, std::free);
size_t arena_bytes;  // without the guards around it
const std::function<void()>* kernel;
std::string failure;
std::mutex one_launch;

Fiber& self() { return *static_cast<Fiber*>(thread); }

#if defined(__x86_64__)
void* scheduler;  // the top of its stack while a fiber runs

// Saves what a function must keep, changes the stack, and goes on where the other one stopped.
__attribute__((naked, noinline)) void change_stack(void** /*save*/, void* /*resume*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#else
ucontext_t scheduler;
#endif

#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake;
const void* scheduler_bottom;
size_t scheduler_size;
#endif

// From a fiber back to the scheduler.
void pause() {
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  const bool last = fiber.state == State::returned;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_bottom, scheduler_size);
#endif
#if defined(__x86_64__)
  change_stack(&fiber.top, scheduler);
#else
  swapcontext(&fiber.context, &scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
}

// From the scheduler to a fiber, until it pauses.
void resume(Fiber& fiber) {
  thread = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStack);
#endif
#if defined(__x86_64__)
  change_stack(&scheduler, fiber.top);
#else
  swapcontext(&scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

unsigned threads() { return block.size.x * block.size.y * block.size.z; }

void fail(const std::string& message) {
  if (failure.empty()) failure = message;
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  try {
    (*kernel)();
    require(self().copies.empty(), "a thread has returned before what it copies has been waited for");
  } catch (const std::exception& error) {
    fail(error.what());
  }
  self().state = State::returned;
  pause();
  std::abort();
}

void prepare(Fiber& fiber, unsigned index) {
  const dim3& size = block.size;
  fiber.index = dim3(index % size.x, index / size.x % size.y, index / (size.x * size.y));
  fiber.lane = index % 32;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
  fiber.state = State::ready;
  fiber.copies.clear();
  fiber.committed = 0;
#if defined(__x86_64__)
  // Six registers and the address to return to; at a function's first instruction rsp + 8 is a multiple of 16.
  void** top = reinterpret_cast<void**>((uintptr_t(fiber.stack) + kStack) / 16 * 16) - 8;
  top[6] = reinterpret_cast<void*>(&enter);
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, enter, 0);
#endif
}

void allocate_stacks() {
  if (fibers[0].stack) return;
  void* stacks = mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  for (unsigned i = 0; i < kMostThreads; ++i) fibers[i].stack = static_cast<char*>(stacks) + i * kStack;
}

// The i-th of `count` to take its turn.
unsigned turn(unsigned i, unsigned count, unsigned offset) {
  if (order == Order::forward) return i;
  if (order == Order::reversed) return count - 1 - i;
  return (i + offset) % count;
}

// Runs the lanes of a warp until each of them waits, then what they wait for. Says whether any lane ran.
bool run_warp(unsigned first, unsigned lanes) {
  unsigned waiting = 0, ran = 0;
  const unsigned offset = order == Order::random ? dice() : 0;
  for (unsigned i = 0; i < lanes; ++i) {
    Fiber& fiber = fibers[first + turn(i, lanes, offset)];
    if (fiber.state == State::ready) resume(fiber), ++ran;
    waiting += fiber.state == State::at_warp;
  }
  if (!failure.empty() || waiting == 0) return ran;
  void* brought[32];
  for (unsigned i = 0; i < 32; ++i) {
    const bool together = i < lanes && fibers[first + i].state == State::at_warp;
    if (!together || fibers[first + i].operation != fibers[first].operation) {
      fail("the lanes of a warp do not meet in one instruction: some have returned, wait elsewhere or do not exist");
      return ran;
    }
    brought[i] = fibers[first + i].brought;
  }
  fibers[first].operation(brought);
  for (unsigned i = 0; i < lanes; ++i) fibers[first + i].state = State::ready;
  return true;
}

// Lets the threads of a block go on, all of which wait for each other; says whether any are left.
bool release_block(unsigned threads) {
  bool any = false;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].state == State::returned) continue;
    fibers[i].state = State::ready;
    any = true;
  }
  return any;
}

void run_block() {
  const unsigned all = threads(), warps = (all + 31) / 32;
  for (unsigned i = 0; i < all; ++i) prepare(fibers[i], i);
  do {
    for (bool ran = true; ran && failure.empty();) {
      ran = false;
      const unsigned offset = order == Order::random ? dice() : 0;
      for (unsigned i = 0; i < warps && failure.empty(); ++i) {
        const unsigned first = turn(i, warps, offset) * 32, lanes = std::min(32u, all - first);
        // A warp goes as far as it can, but for a random order, where others come between.
        while (run_warp(first, lanes) && failure.empty()) {
          ran = true;
          if (order == Order::random) break;
        }
      }
    }
  } while (failure.empty() && release_block(all));
}

void fill_with_nan(void* memory, size_t bytes) { std::fill_n(static_cast<unsigned char*>(memory), bytes, 0xff); }

constexpr size_t kGuard = 64;  // bytes on either side of shared memory that must stay as they are

void allocate_shared(size_t bytes) {
  arena.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 2 * kGuard + 63) / 64 * 64)));
  arena_bytes = bytes;
  block.shared = arena.get() + kGuard;
  for (char* guard : {arena.get(), block.shared + bytes}) {
    std::memset(guard, 0x5a, kGuard);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(guard, kGuard);
#endif
  }
}

void check_guards() {
#if !defined(__SANITIZE_ADDRESS__)
  for (const char* guard : {arena.get(), arena.get() + kGuard + arena_bytes})
    if (std::any_of(guard, guard + kGuard, [](char byte) { return byte != 0x5a; }))
      fail("a thread has written beyond the shared memory of its block");
#endif
}

void begin_launch(dim3 grid, dim3 size, size_t shared_bytes) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u)
    throw std::runtime_error("the grid of a launch is empty or too large");
  if (size.x * size.y * size.z == 0 || size.x * size.y * size.z > kMostThreads)
    throw std::runtime_error("the block of a launch is empty or too large");
  if (shared_bytes > kMostShared) throw std::runtime_error("a block asks for more than 99 KiB of shared memory");
  allocate_stacks();
  block = {dim3(), size, grid, nullptr};
  allocate_shared(shared_bytes);
  failure.clear();
  dice.seed(1);
}

}  // namespace

void meet_warp(Operation operation, void* brought) {
  Fiber& fiber = self();
  fiber.state = State::at_warp, fiber.operation = operation, fiber.brought = brought;
  pause();
}

void meet_block() {
  self().state = State::at_block;
  pause();
}

void require(bool good, const char* message) {
  if (!good) throw std::runtime_error(message);
}

void require_shared(const void* address, size_t bytes, const char* instruction) {
  const char* begin = static_cast<const char*>(address);
  if (begin < block.shared || begin + bytes > block.shared + arena_bytes)
    throw std::runtime_error(std::string(instruction) + " reaches beyond the shared memory of its block");
  if (uintptr_t(address) % bytes) throw std::runtime_error(std::string(instruction) + " is not aligned");
}

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros) {
  fill_with_nan(shared, bytes + zeros);
  self().copies.push_back({shared, global, bytes, zeros, self().committed});
}

void commit_copies() { ++self().committed; }

void wait_for_copies(unsigned groups_left) {
  Fiber& fiber = self();
  size_t left = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group + groups_left >= fiber.committed) {
      fiber.copies[left++] = copy;
      continue;
    }
    std::memcpy(copy.shared, copy.global, copy.bytes);
    std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0, copy.zeros);
  }
  fiber.copies.resize(left);
}

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  begin_launch(grid, size, shared_bytes);
  kernel = &body;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  const size_t offset = order == Order::random ? dice() % blocks : 0;
  for (size_t i = 0; i < blocks && failure.empty(); ++i) {
    const size_t at = order == Order::reversed ? blocks - 1 - i : (i + offset) % blocks;
    block.index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    fill_with_nan(block.shared, shared_bytes);
    run_block();
    check_guards();
  }
  arena.reset();
  if (!failure.empty()) throw std::runtime_error("emulation: " + failure);
}

}  // namespace emulation

// The order in which blocks, warps and lanes take turns: 0 forward, 1 reversed, 2 random.
extern "C" __attribute__((visibility("default"))) void flamingo_kernels_emulation_order(int order) {
  emulation::order = static_cast<emulation::Order>(order);
}
