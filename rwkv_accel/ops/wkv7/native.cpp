// WKV-7 on a CPU, token by token, with the state in registers.
//
//     w_t = exp(-e^-1/2 sigmoid(w0 + w_low_t))
//     S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        out_t = S_t r_t
//
// A row of the state (one value, all keys) needs no other row. So a group of rows small enough for the registers is
// carried through a chunk of tokens, then the next group through the same chunk, whose inputs are still in the cache.
// The forward pass keeps the state before every chunk. The backward pass makes the other states of a chunk again,
// group by group, and walks back through them.
//
// A unit of work is one head of one sequence; no sum crosses units, so results do not depend on the number of threads.
//
// Compiled by native_build.py for one HEAD_SIZE (a multiple of 4) and CHUNK (tokens), for the CPU at hand.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, STATE_REGISTERS = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8, STATE_REGISTERS = 8;
#else
constexpr int WIDTH = 4, STATE_REGISTERS = 16;
#endif

constexpr int largest_power_of_two(int dividing, int limit) {
    int power = 1;
    while (power * 2 <= limit && dividing % (power * 2) == 0) power *= 2;
    return power;
}

constexpr int N = HEAD_SIZE, C = CHUNK;
constexpr int LANES = largest_power_of_two(N, WIDTH);
constexpr int VECTORS = N / LANES;  // of a row
constexpr int FITTING = STATE_REGISTERS / VECTORS < LANES ? STATE_REGISTERS / VECTORS : LANES;
constexpr int ROWS = largest_power_of_two(N, FITTING);  // of a group

// Unaligned: inputs may start anywhere.
typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float *from) { return *reinterpret_cast<const Vector *>(from); }
inline void store(float *to, Vector x) { *reinterpret_cast<Vector *>(to) = x; }

// ---- sums over the lanes of ROWS vectors

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Integers{__VA_ARGS__})
#endif

constexpr auto ALL_LANES = std::make_integer_sequence<int, LANES>();

template <int BLOCK, int ODD, int... I> inline Vector take_blocks(Vector x, Vector y, std::integer_sequence<int, I...>) {
    return SHUFFLE(x, y, (I / BLOCK * 2 * BLOCK + ODD * BLOCK + I % BLOCK)...);
}
template <int BLOCK, int... I> inline Vector swap_blocks(Vector x, std::integer_sequence<int, I...>) {
    return SHUFFLE(x, x, (I ^ BLOCK)...);
}

// Folds pairs of vectors until one is left, whose lanes belong to all rows in turn, then sums within each row's lanes.
template <int COUNT, int BLOCK> inline Vector folded(Vector *x) {
    if constexpr (COUNT > 1) {
        for (int i = 0; i < COUNT / 2; i++) {
            x[i] = take_blocks<BLOCK, 0>(x[2 * i], x[2 * i + 1], ALL_LANES) +
                   take_blocks<BLOCK, 1>(x[2 * i], x[2 * i + 1], ALL_LANES);
        }
        return folded<COUNT / 2, BLOCK / 2>(x);
    } else if constexpr (BLOCK >= 1) {
        x[0] += swap_blocks<BLOCK>(x[0], ALL_LANES);
        return folded<1, BLOCK / 2>(x);
    } else {
        return x[0];
    }
}

inline void lane_sums(Vector (&x)[ROWS], float *sums) {
    const Vector all = folded<ROWS, LANES / 2>(x);
    for (int i = 0; i < ROWS; i++) sums[i] = all[i * (LANES / ROWS)];
}

// ---- the decay

// Relative error below 2e-7. A NaN stays one.
inline Vector exponential(Vector x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    x = x < -87.0f ? Vector{} - 87.0f : x;
    x = x > 87.0f ? Vector{} + 87.0f : x;
    const Vector shifted = x * 1.44269504f + ROUND;
    const Vector whole = shifted - ROUND;
    const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    Vector series = Vector{} + 1.0f / 5040;
    series = series * rest + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    return series * power;
}

constexpr float DECAY_SCALE = -0.60653066f;  // -e^-1/2

// ---- arguments; strides are in values, the last dimension is contiguous

struct View {
    const float *data;
    int64_t batch, token, head;
};

struct Sequence {
    int64_t index, row, begin, end, first_chunk;
};

// ---- one chunk of one head

struct Inputs {
    float r[N], w[N], k[N], v[N], a[N], b[N];
};

// What a thread works on, token by token: arrays apart by a power of two would fall into the same lines of the cache.
// Aligned to these lines: a vector that lies across two of them takes twice the time.
struct alignas(64) Work {
    Inputs in[C], grad[C];
    float out[C][N];           // or its gradient
    float states[C][ROWS][N];  // before every token
    float reads[C][ROWS];      // S_{t-1} a_t
    float shares[C][N];        // sigmoid of the decay's logit
    float d_w0[N];
};

// One per thread, and never on a stack.
thread_local Work thread_work;

// Rows lie further apart than the CPU looks ahead by itself; beyond the end, asking for memory does no harm.
void read_row(float *to, const View &x, const Sequence &sequence, int64_t head, int64_t token) {
    const float *from = x.data + sequence.row * x.batch + token * x.token + head * x.head;
    std::memcpy(to, from, N * sizeof *to);
    const char *later = reinterpret_cast<const char *>(from) + 4 * x.token * sizeof *from;
    for (size_t byte = 0; byte < N * sizeof *from; byte += 64) __builtin_prefetch(later + byte);
}

void read_inputs(Work &work, const View *inputs, const float *w0, const Sequence &sequence, int64_t head, int64_t first,
                 int count) {
    for (int t = 0; t < count; t++) {
        Inputs &in = work.in[t];
        float *const rows[6] = {in.r, in.w, in.k, in.v, in.a, in.b};
        for (int i = 0; i < 6; i++) read_row(rows[i], inputs[i], sequence, head, first + t);
        for (int n = 0; n < N; n += LANES) {
            const Vector share = 1.0f / (1.0f + exponential(-load(in.w + n) - load(w0 + n)));
            store(work.shares[t] + n, share);
            store(in.w + n, exponential(DECAY_SCALE * share));
        }
    }
}

// Multiplies a group of rows with a vector.
inline void multiply(const Vector (&state)[ROWS][VECTORS], const float *x, float *products) {
    Vector sums[ROWS];
    for (int j = 0; j < VECTORS; j++) {
        const Vector x_j = load(x + j * LANES);
        for (int i = 0; i < ROWS; i++) sums[i] = j ? sums[i] + state[i][j] * x_j : state[i][j] * x_j;
    }
    lane_sums(sums, products);
}

inline void load_group(Vector (&state)[ROWS][VECTORS], const float *from) {
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) state[i][j] = load(from + i * N + j * LANES);
}

inline void store_group(float *to, const Vector (&state)[ROWS][VECTORS]) {
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store(to + i * N + j * LANES, state[i][j]);
}

void chunk_forward(Work &work, float *state, int count) {
    const Inputs *in = work.in;
    for (int first = 0; first < N; first += ROWS) {
        Vector rows[ROWS][VECTORS];
        load_group(rows, state + first * N);
        for (int t = 0; t < count; t++) {
            float read[ROWS];
            multiply(rows, in[t].a, read);
            Vector sums[ROWS];
            for (int j = 0; j < VECTORS; j++) {
                const int n = j * LANES;
                const Vector w = load(&in[t].w[n]), k = load(&in[t].k[n]), b = load(&in[t].b[n]), r = load(&in[t].r[n]);
                for (int i = 0; i < ROWS; i++) {
                    rows[i][j] = rows[i][j] * w + in[t].v[first + i] * k + read[i] * b;
                    sums[i] = j ? sums[i] + rows[i][j] * r : rows[i][j] * r;
                }
            }
            lane_sums(sums, &work.out[t][first]);
        }
        store_group(state + first * N, rows);
    }
}

// The states of a group before every token, what they read with a, and what they add to the gradient of r.
void make_states(Work &work, const float *state, int first, int count) {
    const Inputs *in = work.in;
    Vector rows[ROWS][VECTORS];
    load_group(rows, state + first * N);
    for (int t = 0; t < count; t++) {
        multiply(rows, in[t].a, work.reads[t]);
        for (int j = 0; j < VECTORS; j++) {
            const int n = j * LANES;
            const Vector w = load(&in[t].w[n]), k = load(&in[t].k[n]), b = load(&in[t].b[n]);
            Vector d_r = load(&work.grad[t].r[n]);
            for (int i = 0; i < ROWS; i++) {
                store(&work.states[t][i][n], rows[i][j]);
                rows[i][j] = rows[i][j] * w + in[t].v[first + i] * k + work.reads[t][i] * b;
                d_r += work.out[t][first + i] * rows[i][j];
            }
            store(&work.grad[t].r[n], d_r);
        }
    }
}

void chunk_backward(Work &work, const float *state, float *d_state, int count) {
    const Inputs *in = work.in;
    Inputs *grad = work.grad;
    std::memset(grad, 0, count * sizeof *grad);
    for (int first = 0; first < N; first += ROWS) {
        make_states(work, state, first, count);
        Vector d_rows[ROWS][VECTORS];
        load_group(d_rows, d_state + first * N);
        for (int t = count - 1; t >= 0; t--) {
            for (int j = 0; j < VECTORS; j++) {
                const Vector r = load(in[t].r + j * LANES);
                for (int i = 0; i < ROWS; i++) d_rows[i][j] += work.out[t][first + i] * r;
            }
            float d_read[ROWS];
            multiply(d_rows, in[t].b, d_read);
            multiply(d_rows, in[t].k, grad[t].v + first);
            for (int j = 0; j < VECTORS; j++) {
                const int n = j * LANES;
                const Vector a = load(&in[t].a[n]), w = load(&in[t].w[n]);
                Vector d_k = load(&grad[t].k[n]), d_b = load(&grad[t].b[n]);
                Vector d_w = load(&grad[t].w[n]), d_a = load(&grad[t].a[n]);
                for (int i = 0; i < ROWS; i++) {
                    const Vector d = d_rows[i][j], before = load(&work.states[t][i][n]);
                    d_k += in[t].v[first + i] * d;
                    d_b += work.reads[t][i] * d;
                    d_w += d * before;
                    d_a += d_read[i] * before;
                    d_rows[i][j] = d * w + d_read[i] * a;
                }
                store(&grad[t].k[n], d_k), store(&grad[t].b[n], d_b);
                store(&grad[t].w[n], d_w), store(&grad[t].a[n], d_a);
            }
        }
        store_group(d_state + first * N, d_rows);
    }
}

// From the gradient of w to that of the logit: w' = w (-e^-1/2) share (1 - share).
void to_logit_grads(Work &work, int count) {
    for (int t = 0; t < count; t++) {
        for (int n = 0; n < N; n += LANES) {
            const Vector share = load(work.shares[t] + n);
            const Vector slope = load(work.in[t].w + n) * DECAY_SCALE * share * (1.0f - share);
            const Vector d_logit = load(work.grad[t].w + n) * slope;
            store(work.grad[t].w + n, d_logit);
            store(work.d_w0 + n, load(work.d_w0 + n) + d_logit);
        }
    }
}

int tokens_of_chunk(const Sequence &sequence, int64_t chunk) {
    const int64_t left = sequence.end - sequence.begin - chunk * C;
    return left < C ? static_cast<int>(left) : C;
}

}  // namespace

extern "C" {

// inputs: r, w_low, k, v, a, b as [rows,T,H,N]; w0 [H,N]; out [rows,T,H,N] contiguous.
// states [sequences,H,N,N]: in, before the first token; out, behind the last. kept [chunks,H,N,N] or null.
void wkv7_forward(const View *inputs, const float *w0, float *out, float *states, float *kept, const Sequence *sequences,
                  int64_t num_sequences, int64_t num_tokens, int64_t heads, int threads) {
    const int64_t units = num_sequences * heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t unit = 0; unit < units; unit++) {
        Work &work = thread_work;
        const Sequence &sequence = sequences[unit / heads];
        const int64_t head = unit % heads;
        float *state = states + (sequence.index * heads + head) * N * N;
        for (int64_t chunk = 0, token = sequence.begin; token < sequence.end; chunk++, token += C) {
            const int count = tokens_of_chunk(sequence, chunk);
            if (kept) {
                std::memcpy(kept + ((sequence.first_chunk + chunk) * heads + head) * N * N, state, N * N * sizeof *kept);
            }
            read_inputs(work, inputs, w0 + head * N, sequence, head, token, count);
            chunk_forward(work, state, count);
            float *to = out + ((sequence.row * num_tokens + token) * heads + head) * N;
            for (int t = 0; t < count; t++) std::memcpy(to + t * heads * N, work.out[t], sizeof *work.out);
        }
    }
}

// inputs: those of the forward pass and the gradient of out. grads: those of the six inputs, each [rows,T,H,N]
// contiguous or null; d_w0 [sequences,H,N] or null. d_states: in, of the final states; out, of the initial ones.
void wkv7_backward(const View *inputs, const float *w0, float *const *grads, float *d_w0, float *d_states,
                   const float *kept, const Sequence *sequences, int64_t num_sequences, int64_t num_tokens,
                   int64_t heads, int threads) {
    const int64_t units = num_sequences * heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t unit = 0; unit < units; unit++) {
        Work &work = thread_work;
        const Sequence &sequence = sequences[unit / heads];
        const int64_t head = unit % heads;
        float *d_state = d_states + (sequence.index * heads + head) * N * N;
        std::memset(work.d_w0, 0, sizeof work.d_w0);
        for (int64_t chunk = (sequence.end - sequence.begin - 1) / C; chunk >= 0; chunk--) {
            const int64_t token = sequence.begin + chunk * C;
            const int count = tokens_of_chunk(sequence, chunk);
            read_inputs(work, inputs, w0 + head * N, sequence, head, token, count);
            for (int t = 0; t < count; t++) read_row(work.out[t], inputs[6], sequence, head, token + t);
            chunk_backward(work, kept + ((sequence.first_chunk + chunk) * heads + head) * N * N, d_state, count);
            if (grads[1] || d_w0) to_logit_grads(work, count);
            for (int t = 0; t < count; t++) {
                const Inputs &grad = work.grad[t];
                const float *const found[6] = {grad.r, grad.w, grad.k, grad.v, grad.a, grad.b};
                const int64_t offset = ((sequence.row * num_tokens + token + t) * heads + head) * N;
                for (int i = 0; i < 6; i++) {
                    if (grads[i]) std::memcpy(grads[i] + offset, found[i], N * sizeof *found[i]);
                }
            }
        }
        if (d_w0) std::memcpy(d_w0 + (sequence.index * heads + head) * N, work.d_w0, sizeof work.d_w0);
    }
}
}
