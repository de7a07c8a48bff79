// Chooses at run time which instruction set's kernels to use.
#include <cstring>
#include <string>
#if defined(FK_HAVE_AVX2_VNNI) || defined(FK_HAVE_AVX512_AMX)
#include <cpuid.h>
#endif
#if defined(FK_HAVE_AVX512_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "params.h"

namespace flamingo_kernels {

extern const Variant variant_portable, variant_avx2, variant_avx2_vnni;
extern const Variant variant_avx512, variant_avx512_bf16, variant_avx512_amx;

namespace {

// An emulating build compiles every variant for the processor it runs on.
#ifdef FK_EMULATE
#define FK_SUPPORTS(feature) true
#else
#define FK_SUPPORTS(feature) (__builtin_cpu_supports(feature) != 0)
#endif

#if defined(FK_HAVE_AVX2) || defined(FK_HAVE_AVX2_VNNI)
bool has_avx2() { return FK_SUPPORTS("avx2") && FK_SUPPORTS("fma"); }
#endif

#ifdef FK_HAVE_AVX2_VNNI
// Products of 8-bit integers in registers of AVX2: compilers differ in whether they know this by name.
bool has_avx_vnni() {
#ifdef FK_EMULATE
  return true;
#else
  constexpr unsigned avx_vnni = 1u << 4;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx_vnni);
#endif
}
#endif

#ifdef FK_HAVE_AVX512
bool has_avx512() {
  return FK_SUPPORTS("avx512f") && FK_SUPPORTS("avx512bw") && FK_SUPPORTS("avx512vl") && FK_SUPPORTS("avx512dq");
}
#endif

#if defined(FK_HAVE_AVX512_BF16) || defined(FK_HAVE_AVX512_AMX)
// With products of 8-bit integers, which all of these processors have.
bool has_avx512_bf16() { return has_avx512() && FK_SUPPORTS("avx512bf16") && FK_SUPPORTS("avx512vnni"); }
#endif

#ifdef FK_HAVE_AVX512_AMX
// Whether the processor has tile registers with products of bf16 and of 8-bit integers, and the system lets this
// process use them: Linux wants to be asked first, once, and then saves them for all threads.
bool may_use_tiles() {
#if defined(FK_EMULATE)
  return true;
#elif defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
  constexpr unsigned all = amx_bf16 | amx_tile | amx_int8;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Variant* variant;
  bool usable;
};

// Narrowest first.
const Candidate candidates[] = {
    {&variant_portable, true},
#ifdef FK_HAVE_AVX2
    {&variant_avx2, has_avx2()},
#endif
#ifdef FK_HAVE_AVX2_VNNI
    {&variant_avx2_vnni, has_avx2() && has_avx_vnni()},
#endif
#ifdef FK_HAVE_AVX512
    {&variant_avx512, has_avx512()},
#endif
#ifdef FK_HAVE_AVX512_BF16
    {&variant_avx512_bf16, has_avx512_bf16()},
#endif
#ifdef FK_HAVE_AVX512_AMX
    {&variant_avx512_amx, has_avx512_bf16() && may_use_tiles()},
#endif
};

const Variant* widest() {
  const Variant* best = &variant_portable;
  for (const Candidate& candidate : candidates)
    if (candidate.usable) best = candidate.variant;
  return best;
}

const Variant* chosen = widest();

}  // namespace

const Variant& variant() { return *chosen; }

bool select(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    chosen = widest();
    return true;
  }
  for (const Candidate& candidate : candidates)
    if (candidate.usable && std::strcmp(candidate.variant->name, name) == 0) {
      chosen = candidate.variant;
      return true;
    }
  return false;
}

const char* variants() {
  static const std::string names = [] {
    std::string list;
    for (const Candidate& candidate : candidates) {
      if (!candidate.usable) continue;
      if (!list.empty()) list += ',';
      list += candidate.variant->name;
    }
    return list;
  }();
  return names.c_str();
}

}  // namespace flamingo_kernels
