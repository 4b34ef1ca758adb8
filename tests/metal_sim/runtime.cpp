// Runs one dispatch of one kernel, thread by thread, in this process; linked to the compiled kernel (msl_body).
//
// In, on stdin: a job (see `struct job`), then for each buffer its description and bytes. Out, on stdout: the bytes of
// the writable buffers. On an error: one line on stderr and exit code 3.
//
// Every thread of a threadgroup is a fiber with a stack of its own. A simdgroup runs until each of its lanes has
// reached a simdgroup function, a barrier or the end; all lanes must stop at the same place. Buffers and threadgroup
// arrays lie between pages that fault. A kernel built with AddressSanitizer's calls also reports each access
// here: then bounds are exact to the byte, and two accesses of a byte by two threads, one of them a
// write, with no barrier for that memory between them, are a race in every schedule.
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
typedef uint32_t u32;
typedef uint64_t u64;
struct msl_context { u32 position_in_grid[3], group[3], position_in_group[3], groups[3], group_size[3], full_group_size[3], grid[3], index, lane, simdgroup, simdgroups, lanes; };
struct job { u64 buffers, seed, check_bounds, check_races, grid[3], group[3]; };
struct buffer { u64 bytes, writable; char name[48]; };
struct region { char *p; u64 n; char name[48]; bool writable, shared; const void* key; };  // shared: threadgroup memory
struct cell { u32 writer, write_time, reader, read_time; };                            // of one byte; see `race`
static const u64 ABSENT = 2;                                                           // of buffer::writable
enum state { READY, SIMD, BARRIER, DONE };
struct fiber { msl_context c; void* sp; u64 site, last_site; u32 time[2], simd_ops; state st; };

extern "C" { msl_context* msl_cur; }
extern "C" void msl_body(void**);
extern "C" void msl_switch(void** save, void* to);
static const u64 PAGE = 16384, STACK = 256 * 1024, SHARED = 32768, MAX_REGIONS = 96, MAX_BUFFERS = 64;
static job J;
static fiber F[1024], *cur;
static char *stacks, *arena, *shared_begin, *shared_end;
static u64 arena_bytes, shared_bytes, rng;
static region R[MAX_REGIONS];
static int n_regions, n_buffers;
static cell* shadow;
static void *main_sp, *bufs[MAX_BUFFERS];
alignas(64) static char slots[32][2][32][64];  // [simdgroup][parity][lane]

// libgcc before 13 cannot round to bfloat; returned in a vector register, as a __bf16
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float f) {
  u32 u = __builtin_bit_cast(u32, f);
  u = (u & 0x7fffffff) > 0x7f800000 ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1);
  return __builtin_bit_cast(__bf16, (uint16_t)(u >> 16));
}

// ---- errors
[[noreturn]] static void stop(const char* text) { fflush(stdout); fprintf(stderr, "metal_sim: %s\n", text); _exit(3); }
static void place(char* s, u64 n, const fiber* f) {
  const u32* g = f->c.group;
  snprintf(s, n, "threadgroup (%u, %u, %u) thread %u", g[0], g[1], g[2], f->c.index);
  if (f->last_site) snprintf(s + strlen(s), n - strlen(s), ", after line %lu", (unsigned long)f->last_site / 1000);
}
[[noreturn]] static void stop_here(const char* text, const void* pc = nullptr) {
  char where[160] = "", all[640];
  if (cur) place(where, sizeof where, cur);
  snprintf(all, sizeof all, "%s [%s]", text, where);
  if (pc) snprintf(all + strlen(all), sizeof all - strlen(all), " pc=%#lx", (unsigned long)((u64)pc - (u64)(void*)msl_body));
  stop(all);
}
EXPORT [[noreturn]] void msl_fail(const char* text) { stop_here(text); }

// ---- memory: [fault page][bytes, ending at the next page][fault page]...
static u64 pages(u64 n) { return (n + PAGE - 1) / PAGE * PAGE; }
static void* map(u64 n, int access = PROT_READ | PROT_WRITE) {
  void* p = mmap(nullptr, n, access, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) stop("out of memory");
  return p;
}
static char* place_region(char* at, u64 n, const char* name, bool writable, bool shared, const void* key) {
  if (n_regions == MAX_REGIONS) stop("too many buffers and threadgroup arrays");
  char* p = at + PAGE + pages(n) - (n + 15) / 16 * 16;
  mprotect(at + PAGE, pages(n), PROT_READ | PROT_WRITE);
  memset(at + PAGE, 0xFF, pages(n));  // NaN
  region& r = R[n_regions++] = {p, n, "", writable, shared, key};
  strncpy(r.name, name, sizeof r.name - 1);
  return p;
}
static region* near_region(const char* p) {  // the region that p lies in or was meant for
  region* best = nullptr;
  u64 d = ~0ul;
  for (int i = 0; i < n_regions; i++) {
    region& r = R[i];
    u64 e = p < r.p ? (u64)(r.p - p) : p >= r.p + r.n ? (u64)(p - r.p - r.n) + 1 : 0;
    if (e < d) d = e, best = &r;
  }
  return best;
}
EXPORT void* msl_threadgroup_alloc(const void* key, u64 n, const char* name) {
  for (int i = n_buffers; i < n_regions; i++) if (R[i].key == key) return R[i].p;
  if ((shared_bytes += n) > SHARED) {
    char t[128];
    snprintf(t, sizeof t, "%lu bytes of threadgroup memory, 32768 is the limit", (unsigned long)shared_bytes);
    stop_here(t);
  }
  char* p = place_region(shared_end, n, name, true, true, key);
  shared_end += PAGE + pages(n);
  if (shadow) memset((void*)(shadow + (p - arena)), 0, n * sizeof(cell));
  return p;
}

// ---- accesses. A thread's time for a kind of memory is (threadgroup barriers for it << 16) + simdgroup barriers.
// An id is thread + 1 in the grid; a reader may also be several lanes of a simdgroup, several simdgroups of a group,
// or several groups.
static const u32 LANES = 1u << 30, SIMDGROUPS = 2u << 30, GROUPS = 3u << 30;
static u32 threads_per_group() { return (u32)(J.group[0] * J.group[1] * J.group[2]); }
static u32 group_of(u32 id) { return id >= GROUPS ? ~0u : id >= SIMDGROUPS ? id - SIMDGROUPS : id >= LANES ? (id - LANES) / 32 : (id - 1) / 1024; }
static u32 simdgroup_of(u32 id) { return id >= SIMDGROUPS ? ~0u : id >= LANES ? id - LANES : (id - 1) / 32; }
static bool ordered(u32 id, u32 then, u32 me, u32 now) {  // has `me`, now, waited for what `id` did then?
  if (!id || id == me) return true;
  if (group_of(id) != group_of(me)) return false;
  if ((now >> 16) > (then >> 16)) return true;
  return simdgroup_of(id) == simdgroup_of(me) && now > then;
}
[[noreturn]] static void race(const region* r, const char* p, u32 other, bool other_wrote, bool wrote, void* pc) {
  char t[320], who[64];
  if (other >= LANES) snprintf(who, sizeof who, "several threads");
  else snprintf(who, sizeof who, "thread %u of threadgroup %u", (other - 1) % 1024, (other - 1) / 1024);
  snprintf(t, sizeof t, "race on %s `%s`, byte %lu: %s here, %s by %s, no barrier between", r->shared ? "threadgroup memory" : "buffer",
           r->name, (unsigned long)(p - r->p), wrote ? "written" : "read", other_wrote ? "written" : "read", who);
  stop_here(t, pc);
}
static void access(const char* p, u64 n, bool write, bool atomic, void* pc) {
  if ((u64)(p - arena) >= arena_bytes) return;  // the thread's own memory
  region* r = near_region(p);
  if (J.check_bounds && (p < r->p || p + n > r->p + r->n)) {
    char t[200];
    snprintf(t, sizeof t, "%s of %lu bytes out of bounds at byte %ld of `%s` (%lu bytes)", write ? "write" : "read", (unsigned long)n, (long)(p - r->p), r->name, (unsigned long)r->n);
    stop_here(t, pc);
  }
  if (!J.check_races || atomic) return;
  const msl_context& c = cur->c;
  u32 group = c.group[0] + c.groups[0] * (c.group[1] + c.groups[1] * c.group[2]);
  u32 me = group * 1024 + c.index + 1, now = cur->time[r->shared];
  for (cell* s = shadow + (p - arena); n--; s++, p++) {
    if (!ordered(s->writer, s->write_time, me, now)) race(r, p, s->writer, true, write, pc);
    if (write) {
      if (!ordered(s->reader, s->read_time, me, now)) race(r, p, s->reader, false, true, pc);
      s->writer = me, s->write_time = now, s->reader = 0;
    } else {
      u32 o = s->reader;
      if (ordered(o, s->read_time, me, now)) s->reader = me;
      else if (group_of(o) != group_of(me)) s->reader = GROUPS;
      else if (simdgroup_of(o) != simdgroup_of(me)) s->reader = SIMDGROUPS + group;
      else s->reader = LANES + simdgroup_of(me);
      s->read_time = now;
    }
  }
}
#define HERE __builtin_return_address(0)
#define TRACE(n)                                                                          \
  EXPORT void __asan_load##n(void* p) { access((char*)p, n, false, false, HERE); }        \
  EXPORT void __asan_store##n(void* p) { access((char*)p, n, true, false, HERE); }
TRACE(1) TRACE(2) TRACE(4) TRACE(8) TRACE(16)
EXPORT void __asan_loadN(void* p, u64 n) { access((char*)p, n, false, false, HERE); }
EXPORT void __asan_storeN(void* p, u64 n) { access((char*)p, n, true, false, HERE); }
EXPORT void* __asan_memset(void* p, int v, u64 n) { return access((char*)p, n, true, false, HERE), memset(p, v, n); }
EXPORT void* __asan_memcpy(void* p, const void* from, u64 n) {
  access((const char*)from, n, false, false, HERE);
  access((char*)p, n, true, false, HERE);
  return memmove(p, from, n);
}
EXPORT void* __asan_memmove(void* p, const void* from, u64 n) { return __asan_memcpy(p, from, n); }
EXPORT void __asan_handle_no_return() {}
EXPORT void msl_atomic_access(const void* p, u32 n, bool write) { access((const char*)p, n, write, true, __builtin_return_address(0)); }

// ---- fibers
#if defined(__APPLE__)
#define SYMBOL(s) "_" s
#else
#define SYMBOL(s) s
#endif
#if defined(__x86_64__)
static const int FRAME = 8, RETURN = 6;  // words on a fresh stack, and which is the return address
asm(".text\n.globl " SYMBOL("msl_switch") "\n" SYMBOL("msl_switch") ":\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#elif defined(__aarch64__)
static const int FRAME = 20, RETURN = 11;
asm(".text\n.globl " SYMBOL("msl_switch") "\n" SYMBOL("msl_switch") ":\n"
    "sub sp,sp,#160\n stp x19,x20,[sp]\n stp x21,x22,[sp,#16]\n stp x23,x24,[sp,#32]\n stp x25,x26,[sp,#48]\n stp x27,x28,[sp,#64]\n"
    "stp x29,x30,[sp,#80]\n stp d8,d9,[sp,#96]\n stp d10,d11,[sp,#112]\n stp d12,d13,[sp,#128]\n stp d14,d15,[sp,#144]\n"
    "mov x9,sp\n str x9,[x0]\n mov sp,x1\n"
    "ldp x19,x20,[sp]\n ldp x21,x22,[sp,#16]\n ldp x23,x24,[sp,#32]\n ldp x25,x26,[sp,#48]\n ldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\n ldp d8,d9,[sp,#96]\n ldp d10,d11,[sp,#112]\n ldp d12,d13,[sp,#128]\n ldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\n ret\n");
#else
#error "metal_sim: write msl_switch for this processor"
#endif
static void wait(state st, u64 site) {
  cur->st = st, cur->site = cur->last_site = site;
  msl_switch(&cur->sp, main_sp);
}
static void enter() {
  msl_body(bufs);
  wait(DONE, 0);
  abort();
}
EXPORT void msl_threadgroup_barrier(int flags, u64 site) {
  fiber* f = cur;
  wait(BARRIER, site);
  for (int shared = 0; shared < 2; shared++) if (flags >> shared & 1) f->time[shared] += 1u << 16;
}
EXPORT const char* msl_exchange(const void* p, u32 n, u64 site) {
  auto table = slots[cur->c.simdgroup][cur->simd_ops++ & 1];
  memcpy(table[cur->c.lane], p, n);
  wait(SIMD, site);
  return table[0];
}
EXPORT void msl_simdgroup_barrier(int flags, u64 site) {
  char z = 0;
  fiber* f = cur;
  msl_exchange(&z, 1, site);
  for (int shared = 0; shared < 2; shared++) if (flags >> shared & 1) f->time[shared]++;
}

// ---- scheduling. seed 0: simdgroups in order; odd: in random order, each as far as it gets; even: mixed at every step
static u64 rnd() { rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17; return rng; }
static void shuffle(u32* v, u32 n) { if (J.seed) for (u32 i = n; i > 1; i--) { u32 k = rnd() % i, t = v[k]; v[k] = v[i - 1], v[i - 1] = t; } }
static const char* doing(const fiber& f, char* s) {
  if (f.st == DONE) return "has returned";
  snprintf(s, 64, "waits at line %lu", (unsigned long)f.site / 1000);
  return s;
}
static void differ(const char* what, const fiber& a, const fiber& b) {
  char s[2][64], t[320];
  snprintf(t, sizeof t, "%s in divergent control flow: thread %u %s, thread %u %s", what, a.c.index, doing(a, s[0]), b.c.index, doing(b, s[1]));
  stop_here(t);
}
static state run_simdgroup(u32 first, u32 n) {  // to the next place where all its lanes stop
  u32 lanes[32];
  for (u32 i = 0; i < n; i++) lanes[i] = first + i;
  shuffle(lanes, n);
  for (u32 i = 0; i < n; i++) {
    cur = &F[lanes[i]], msl_cur = &cur->c, cur->st = READY;
    msl_switch(&main_sp, cur->sp);
  }
  for (u32 i = 1; i < n; i++) {
    const fiber &a = F[first], &b = F[first + i];
    if (a.st == b.st && a.site == b.site) continue;
    differ(a.st == BARRIER || b.st == BARRIER ? "threadgroup_barrier" : "simdgroup function", a, b);
  }
  return F[first].st;
}
static void run_group(const u32* g, const u32* groups) {
  u32 size[3], n = 1;
  for (int k = 0; k < 3; k++) {  // dispatchThreads: the last groups may be smaller
    u64 left = J.grid[k] - g[k] * J.group[k];
    size[k] = (u32)(left < J.group[k] ? left : J.group[k]), n *= size[k];
  }
  u32 n_simd = (n + 31) / 32;
  for (u32 i = 0; i < n; i++) {
    fiber& f = F[i] = fiber{};
    u32 p[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int k = 0; k < 3; k++) {
      f.c.position_in_group[k] = p[k], f.c.group[k] = g[k], f.c.groups[k] = groups[k], f.c.group_size[k] = size[k];
      f.c.full_group_size[k] = (u32)J.group[k], f.c.grid[k] = (u32)J.grid[k], f.c.position_in_grid[k] = g[k] * (u32)J.group[k] + p[k];
    }
    f.c.index = i, f.c.lane = i % 32, f.c.simdgroup = i / 32, f.c.simdgroups = n_simd;
    f.c.lanes = i / 32 + 1 < n_simd ? 32 : n - i / 32 * 32;
    void** sp = (void**)(stacks + (i + 1) * STACK - 64) - FRAME;
    memset((void*)sp, 0, FRAME * sizeof(void*));
    sp[RETURN] = (void*)enter;
    f.sp = sp;
  }
  n_regions = n_buffers, shared_bytes = 0, shared_end = shared_begin;
  state at[32] = {};
  for (u32 s, last = ~0u;; last = s) {
    u32 ready[32], n_ready = 0, done = 0;
    for (u32 i = 0; i < n_simd; i++) { if (at[i] <= SIMD) ready[n_ready++] = i; done += at[i] == DONE; }
    if (!n_ready) {
      if (done == n_simd) break;
      for (u32 i = 1; i < n_simd; i++) if (at[i] != at[0] || F[i * 32].site != F[0].site) differ("threadgroup_barrier", F[0], F[i * 32]);
      for (u32 i = 0; i < n_simd; i++) at[i] = READY;
      s = ~0u;
      continue;
    }
    shuffle(ready, n_ready);
    s = (J.seed & 1) && last != ~0u && at[last] <= SIMD ? last : ready[0];
    u32 lanes = F[s * 32].c.lanes;
    at[s] = run_simdgroup(s * 32, lanes);
  }
}

// ---- job
static void read_all(void* p, u64 n) { if (fread(p, 1, n, stdin) != n) stop("the job is cut short"); }
static void on_fault(int sig, siginfo_t* info, void*) {
  char t[200];
  const char* p = (const char*)info->si_addr;
  if (sig == SIGILL || sig == SIGTRAP) stop_here("misaligned access, or an array index out of bounds", sig == SIGILL ? p : nullptr);
  if ((u64)(p - arena) < arena_bytes) {
    region* r = near_region(p);
    bool inside = p >= r->p && p < r->p + r->n;
    if (inside) snprintf(t, sizeof t, "write to the const buffer `%s`, byte %ld", r->name, (long)(p - r->p));
    else snprintf(t, sizeof t, "access out of bounds at byte %ld of `%s` (%lu bytes)", (long)(p - r->p), r->name, (unsigned long)r->n);
    stop_here(t);
  }
  snprintf(t, sizeof t, "fault at address %p: wild or misaligned pointer, null buffer or stack overflow", (const void*)p);
  stop_here(t);
}
static void on_time(int) { sched_yield(); }
// METAL_SIM_SHARED: "file@address,..", memory that runs share, of as many bytes as the file has. Runs may wait for each
// other there, and be more than this machine's cores.
static void map_shared(const char* at) {
  char path[256];
  u64 address;
  for (int n; *at; at += n + (at[n] == ',')) {
    if (sscanf(at, "%255[^@]@%lx%n", path, (unsigned long*)&address, &n) != 2) stop("METAL_SIM_SHARED: no file@address");
    int file = open(path, O_RDWR);
    off_t bytes = lseek(file, 0, SEEK_END);
    if (bytes < 0 || mmap((void*)address, (u64)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) stop(path);
    close(file);
  }
  struct sigaction sa = {};
  sa.sa_handler = on_time, sa.sa_flags = SA_RESTART;
  sigaction(SIGALRM, &sa, nullptr);
  const struct itimerval often = {{0, 100}, {0, 100}};
  setitimer(ITIMER_REAL, &often, nullptr);
}
int main() {
  read_all(&J, sizeof J);
  n_buffers = (int)J.buffers;
  if (J.buffers > MAX_BUFFERS) stop("too many buffers");
  static buffer B[MAX_BUFFERS];
  read_all(B, J.buffers * sizeof(buffer));
  arena_bytes = 2 * PAGE * MAX_REGIONS + SHARED;  // fault pages, and room for the threadgroup arrays
  for (int i = 0; i < n_buffers; i++) arena_bytes += pages(B[i].bytes);
  arena = (char*)map(arena_bytes, PROT_NONE);
  if (J.check_races) shadow = (cell*)map(arena_bytes * sizeof(cell));
  char* at = arena;
  for (int i = 0; i < n_buffers; at += PAGE + pages(B[i].bytes), i++) {
    if (B[i].writable == ABSENT) continue;  // stays null
    bufs[i] = place_region(at, B[i].bytes, B[i].name, B[i].writable, false, nullptr);
    read_all(bufs[i], B[i].bytes);
    if (!B[i].writable) mprotect(at + PAGE, pages(B[i].bytes), PROT_READ);
  }
  n_buffers = n_regions, shared_begin = at;
  static char signal_stack[65536];
  stack_t ss = {};
  ss.ss_sp = signal_stack, ss.ss_size = sizeof signal_stack;
  sigaltstack(&ss, nullptr);
  struct sigaction sa = {};
  sa.sa_sigaction = on_fault, sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  for (int s : faults) sigaction(s, &sa, nullptr);

  u32 groups[3];
  for (int k = 0; k < 3; k++) {
    if (J.group[k] > J.grid[k]) J.group[k] = J.grid[k];  // as MLX does
    if (!J.grid[k]) stop("empty grid");
    groups[k] = (u32)((J.grid[k] + J.group[k] - 1) / J.group[k]);
  }
  if (threads_per_group() > 1024) stop("more than 1024 threads in a threadgroup");
  stacks = (char*)map(threads_per_group() * STACK);
  if (const char* shared = getenv("METAL_SIM_SHARED")) map_shared(shared);
  rng = J.seed * 0x9E3779B97F4A7C15ull + 1;
  u32 n = groups[0] * groups[1] * groups[2], *order = (u32*)map(n * sizeof(u32) + 1);
  for (u32 i = 0; i < n; i++) order[i] = i;
  shuffle(order, n);
  for (u32 i = 0; i < n; i++) {
    u32 g[3] = {order[i] % groups[0], order[i] / groups[0] % groups[1], order[i] / groups[0] / groups[1]};
    run_group(g, groups);
  }
  for (int i = 0; i < n_buffers; i++) if (R[i].writable) fwrite(R[i].p, 1, R[i].n, stdout);
  return fflush(stdout) ? 3 : 0;
}
