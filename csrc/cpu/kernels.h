// What each instruction set implements.
#pragma once

#include "compress_args.h"
#include "decode_scratch.h"
#include "read_scratch.h"

namespace mdkv {

struct PackArgs {
  Format format;
  Element element;  // of formats that hold elements
  int64_t page_bytes;
};

struct Kernels {
  const char* isa;

  // Brings a unit's queries into every space its formats use.
  void (*prepare)(const DecodeArgs&, const Unit&, TileScratch&, Prepared&);
  // Attends over a run of pages, and at its end fetches the beginning of the next.
  void (*attend)(const DecodeArgs&, const PageRun&, const PageRun& next, const Prepared&,
                 TileScratch&, Partial&);
  // Merges a unit's parts, back-projects and writes its output rows.
  void (*finish)(const DecodeArgs&, const Unit&, Partial* parts, int64_t num_parts, TileScratch&);

  // Reads a run of a source's pages back.
  void (*read_pages)(const ReadArgs&, const Source&, int64_t begin, int64_t end, ReadScratch&);
  // Elements of one type to another, rounding to nearest even.
  void (*convert)(const void* from, Element from_type, void* to, Element to_type, int64_t count);
  // Packs keys and values, float [tokens, rank], into the pages of one list.
  // codes: scratch of tokens_per_page * rank bytes.
  void (*pack_list)(const PackArgs&, const float* keys, const float* values, int64_t tokens,
                    uint8_t* codes, uint8_t* pages);

  // Compression; one head each. tile and tiles: scratch of one and two [kScoreTile, rows].
  void (*read_back)(const ReadBack&);
  void (*row_sums)(const Scores&, const Causal&, int rows, int64_t begin, int64_t end, float* tile,
                   float* largest, float* sum);
  void (*token_sums)(const TokenSums&, int64_t begin, int64_t end, float* tiles);
};

// Null where the build has no such kernels; whether the machine has the instructions is isa.h's.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace mdkv
