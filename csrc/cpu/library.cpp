// Schemas of the operators, and the Python module whose import registers them.
#include <Python.h>
#include <torch/library.h>

#include "isa.h"

TORCH_LIBRARY(mdkv, m) {
  m.def("store_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()");
  m.def(
      "load_kv(Tensor kv_cache, Tensor block_ids, int num_tokens, Tensor(a!) keys, "
      "Tensor(b!) values) -> ()");
  m.def(
      "mixed_decode(Tensor query, Tensor kv_cache, int layer, int num_kv_heads, "
      "Tensor block_table, Tensor query_rows, Tensor lengths, Tensor leases, Tensor formats, "
      "Tensor basis_k, "
      "Tensor basis_v, Tensor hadamard, int basis_first_page, int basis_pages_per_head, "
      "int prompt_basis_rank, float scale, Tensor(a!) output, Tensor(b!)? lse) -> ()");
  m.def(
      "read_leases(Tensor kv_cache, int layer, int num_kv_heads, Tensor block_table, "
      "Tensor sources, Tensor targets, Tensor formats, Tensor basis_k, Tensor basis_v, "
      "Tensor hadamard, int basis_first_page, int basis_pages_per_head, int prompt_basis_rank, "
      "Tensor(a!) keys, Tensor(b!) values) -> ()");
  m.def(
      "pack_pages(Tensor keys, Tensor values, Tensor counts, Tensor format, Tensor(a!) pages, "
      "ScalarType element) -> ()");
  m.def("round_trip(Tensor keys, Tensor values, int bits) -> (Tensor, Tensor)");
  m.def(
      "loss_sums(Tensor queries, Tensor keys, Tensor[] candidate_queries, "
      "Tensor[] candidate_keys, int span, int group, float scale, bool together) -> Tensor");
  m.def(
      "allocate(Tensor losses, Tensor tokens_per_page, bool drop, int num_pages) "
      "-> (Tensor choice, Tensor tokens, float objective, float lower_bound)");
  m.def(
      "pack_layer(Tensor[] keys, Tensor[] values, Tensor formats, Tensor choice, "
      "Tensor(a!) pages, ScalarType element) -> int");
  m.def("cpu_isas() -> str[]", &mdkv::available_isas);
}

PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
