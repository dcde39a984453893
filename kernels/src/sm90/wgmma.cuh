// wgmma m64nNk16 with A in registers and B in shared memory, fp32 accumulators: C (64 x N) (+)= A (64 x 16) B (16 x N).
//
// B is made of 8 x 8 core matrices of 128 contiguous bytes (no swizzle). Its descriptor says how far apart they are along K and along N;
// kBTransposed says that the rows of a core matrix run along K (16 bytes along N each), otherwise they run along N.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "ptx.cuh"

namespace powertrain::sm90 {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Where B's core matrices start, and how far apart they are along K and along N, in bytes (multiples of 16).
struct CoreMatrices {
  uint32_t low, high;  // of the descriptor
  __device__ __forceinline__ CoreMatrices(uint32_t address, uint32_t k_stride, uint32_t n_stride) : low(address >> 4 | k_stride >> 4 << 16), high(n_stride >> 4) {}
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + (offset >> 4)), "r"(high));
    return descriptor;
  }
};

// Register lists, each extending the shorter one.
#define PT_REGISTERS_16 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" 
#define PT_OPERANDS_16 \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]),  \
  "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
#define PT_REGISTERS_20 \
  PT_REGISTERS_16 ",%16,%17,%18,%19" 
#define PT_OPERANDS_20 \
  PT_OPERANDS_16, "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19])
#define PT_REGISTERS_32 \
  PT_REGISTERS_20 ",%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" 
#define PT_OPERANDS_32 \
  PT_OPERANDS_20, "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]),  \
  "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define PT_REGISTERS_36 \
  PT_REGISTERS_32 ",%32,%33,%34,%35" 
#define PT_OPERANDS_36 \
  PT_OPERANDS_32, "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35])
#define PT_REGISTERS_64 \
  PT_REGISTERS_36 ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55"  \
  ",%56,%57,%58,%59,%60,%61,%62,%63" 
#define PT_OPERANDS_64 \
  PT_OPERANDS_36, "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]),  \
  "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]),  \
  "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]),  \
  "+f"(c[62]), "+f"(c[63])
#define PT_REGISTERS_68 \
  PT_REGISTERS_64 ",%64,%65,%66,%67" 
#define PT_OPERANDS_68 \
  PT_OPERANDS_64, "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67])

#define PT_WGMMA_TYPED(n, type, registers, a0, a1, a2, a3, b, scale, transposed, ...)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " scale ", 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, {" a0 "," a1 "," a2 "," a3 \
               "}, " b ", p, 1, 1, " transposed ";\n}\n"                                                                   \
               : __VA_ARGS__                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"((int)accumulate), "n"((int)kBTransposed))
#define PT_WGMMA(n, registers, a0, a1, a2, a3, b, scale, transposed, ...)                                                        \
  template <typename T, bool kBTransposed>                                                                                       \
  __device__ __forceinline__ void wgmma(float (&c)[n / 2], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {       \
    if constexpr (std::is_same_v<T, __half>)                                                                                     \
      PT_WGMMA_TYPED(n, "f16", registers, a0, a1, a2, a3, b, scale, transposed, __VA_ARGS__);                                     \
    else                                                                                                                         \
      PT_WGMMA_TYPED(n, "bf16", registers, a0, a1, a2, a3, b, scale, transposed, __VA_ARGS__);                                    \
  }
PT_WGMMA(32, PT_REGISTERS_16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", PT_OPERANDS_16)
PT_WGMMA(40, PT_REGISTERS_20, "%20", "%21", "%22", "%23", "%24", "%25", "%26", PT_OPERANDS_20)
PT_WGMMA(64, PT_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", PT_OPERANDS_32)
PT_WGMMA(72, PT_REGISTERS_36, "%36", "%37", "%38", "%39", "%40", "%41", "%42", PT_OPERANDS_36)
PT_WGMMA(128, PT_REGISTERS_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", PT_OPERANDS_64)
PT_WGMMA(136, PT_REGISTERS_68, "%68", "%69", "%70", "%71", "%72", "%73", "%74", PT_OPERANDS_68)
#undef PT_WGMMA
#undef PT_WGMMA_TYPED

}  // namespace powertrain::sm90
