/* Sums of squares of per-sample gradients of a linear layer, which never reach memory.

   Of B samples' factors left [B, T, m] and right [B, T, n] one sample's gradient is

       G[b] = sum_t left[b, t, :] (x) right[b, t, :]        [m, n]

   A tile of it, ROWS x COLUMNS, stays in registers while the tokens go by; then its square is added
   to the tile's sums and to the sample's score. The sums meet memory once a call.

   `pack_left` and `pack_right` bring the factors into panels, in which a tile reads without gaps. */

#include <stddef.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 6 };
#else
enum { LANES = 4, ROWS = 6 };
#endif
enum { VECTORS = 2, COLUMNS = LANES * VECTORS, CHAINS = 4, STRIPE = 8 };

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef unsigned char marked __attribute__((vector_size(LANES), aligned(1)));
typedef vector block[ROWS][VECTORS];

const ptrdiff_t rows_of_tile = ROWS, columns_of_tile = COLUMNS;

/* [tokens, width] -> [ceil(width / size), tokens, size], zeros behind the last column. A few tokens
   at a time, which stay near while all panels take theirs. */
static inline __attribute__((always_inline)) void pack(
    const float *x, ptrdiff_t tokens, ptrdiff_t width, int size, float *out)
{
    for (ptrdiff_t from = 0; from < tokens; from += STRIPE) {
        ptrdiff_t to = from + STRIPE < tokens ? from + STRIPE : tokens;
        for (ptrdiff_t j = 0; j < width; j += size)
            for (ptrdiff_t t = from; t < to; t++) {
                const float *in = x + t * width + j;
                float *panel = out + j * tokens + t * size;
                if (width - j >= size)
                    for (int c = 0; c < size; c++) panel[c] = in[c];
                else
                    for (int c = 0; c < size; c++) panel[c] = j + c < width ? in[c] : 0;
            }
    }
}

void pack_left(const float *x, ptrdiff_t tokens, ptrdiff_t width, float *out)
{
    pack(x, tokens, width, ROWS, out);
}

void pack_right(const float *x, ptrdiff_t tokens, ptrdiff_t width, float *out)
{
    pack(x, tokens, width, COLUMNS, out);
}

/* All samples of one tile. Squares are added by the same operations whatever else is asked for, so
   that their bits do not depend on it. */
static inline __attribute__((always_inline)) void multiply(
    const float *restrict left, const float *restrict right, ptrdiff_t samples, ptrdiff_t tokens,
    block squares, block sums, block chosen, double *scores, int signed_too, int scored)
{
    for (ptrdiff_t b = 0; b < samples; b++) {
        block g = {0};
        for (ptrdiff_t t = 0; t < tokens; t++, left += ROWS, right += COLUMNS) {
            vector x[VECTORS];
            for (int v = 0; v < VECTORS; v++) x[v] = *(const unaligned *)(right + v * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) g[r][v] += left[r] * x[v];
        }
        vector score[CHAINS] = {0};
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                squares[r][v] += g[r][v] * g[r][v];
                if (signed_too) sums[r][v] += g[r][v];
                if (scored)
                    score[(r * VECTORS + v) % CHAINS] += (chosen[r][v] * g[r][v]) * g[r][v];
            }
        if (scored) {
            vector all = (score[0] + score[1]) + (score[2] + score[3]);
            float total = 0;
#pragma GCC unroll 16
            for (int c = 0; c < LANES; c++) total += all[c];
            scores[b] += total;
        }
    }
}

static inline void add(float *to, ptrdiff_t stride, block found, int rows, int columns)
{
    if (rows == ROWS && columns == COLUMNS)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                *(unaligned *)(to + r * stride + v * LANES) += found[r][v];
    else
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                to[r * stride + c] += found[r][c / LANES][c % LANES];
}

/* 1 at the entries that count, 0 elsewhere and outside the matrix. */
static inline void choose(
    block chosen, const unsigned char *marks, ptrdiff_t stride, int rows, int columns)
{
    if (rows == ROWS && columns == COLUMNS && marks)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                chosen[r][v] = __builtin_convertvector(
                    *(const marked *)(marks + r * stride + v * LANES), vector);
    else
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                chosen[r][c / LANES][c % LANES] = marks ? marks[r * stride + c] : 1;
}

/* The rows `first` to `last` of tiles, all columns.

   left, right    packed
   squares, sums  [m, n], added to; may be 0
   marks          [m, n]; 0 for all entries
   scores         [samples], added to; 0 where none are wanted */
void add_squares(
    const float *left, const float *right, ptrdiff_t samples, ptrdiff_t tokens,
    ptrdiff_t m, ptrdiff_t n, ptrdiff_t first, ptrdiff_t last,
    float *squares, float *sums, const unsigned char *marks, double *scores)
{
    for (ptrdiff_t j = 0; j < n; j += COLUMNS) {
        const float *x = right + j * samples * tokens;
        int columns = n - j < COLUMNS ? (int)(n - j) : COLUMNS;
        for (ptrdiff_t i = first * ROWS; i < last * ROWS; i += ROWS) {
            const float *y = left + i * samples * tokens;
            int rows = m - i < ROWS ? (int)(m - i) : ROWS;
            ptrdiff_t at = i * n + j;
            block squared = {0}, summed = {0}, chosen = {0};
            for (int r = 0; r < rows; r++) {
                for (int v = 0; v < VECTORS && squares; v++)
                    __builtin_prefetch(squares + at + r * n + v * LANES, 1);
                if (marks) __builtin_prefetch(marks + at + (ROWS + r) * n); /* of the next tile */
            }
            if (scores) choose(chosen, marks ? marks + at : 0, n, rows, columns);
            if (sums)
                multiply(y, x, samples, tokens, squared, summed, chosen, scores, 1, scores != 0);
            else if (scores)
                multiply(y, x, samples, tokens, squared, summed, chosen, scores, 0, 1);
            else
                multiply(y, x, samples, tokens, squared, summed, chosen, scores, 0, 0);
            if (squares) add(squares + at, n, squared, rows, columns);
            if (sums) add(sums + at, n, summed, rows, columns);
        }
    }
}
