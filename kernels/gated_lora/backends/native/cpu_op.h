// The torch ops `gated_lora_` and `mix_act_` on a CPU without Python on the way.
//
// A model calls them at every layer of every step, mostly to hear that no row has an adapter: a
// call into Python would cost more than the answer. Each site has a door here. Python opens it
// with what a call needs, and shuts it whenever the site changes; while it is shut the call goes to
// Python, as `gated_lora_python_`. `mix_act_` is C++ only where no slot has experts. `op.py` has the
// same structures.
//
// Sites and blocks come as handles: 0-d int64 tensors that hold their numbers.
//
// PyTorch is called through its stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), by
// pointers from Python: no header and no ABI of PyTorch is needed.
#pragma once
#include <stdexcept>
#include <string>

struct Torch {
  int32_t (*library_init_impl)(const char*, const char*, const char*, uint32_t, void**);
  int32_t (*library_impl)(void*, const char*, void (*)(uint64_t*, uint64_t, uint64_t));
  int32_t (*call_dispatcher)(const char*, const char*, uint64_t*);
  int32_t (*delete_tensor_object)(void*);
  int32_t (*get_data_ptr)(void*, void**);
  int32_t (*get_size)(void*, int64_t, int64_t*);
  int32_t (*get_stride)(void*, int64_t, int64_t*);
  int32_t (*get_dtype)(void*, int32_t*);
  int32_t types[3];  // PyTorch's numbers of float32, bfloat16 and float16 (-1: not served)
};

struct Door {
  const int64_t* active;  // whether the step has an adapter; null: shut
  const Slot* const* slots;
  int64_t num_slots;
  const int32_t* slots_T;
  int64_t max_tokens;
  const float* given;  // numbers that come with each row; null: no slot reads them
  int64_t given_stride;
};

namespace {

Torch torch_api;
std::vector<Door> doors;             // by the site's number
std::vector<const int64_t*> blocks;  // by the block's number: whether it has experts

struct Matrix {
  void* handle;
  void* data = nullptr;
  int64_t rows = 0, stride = 0, last = 0;
  int32_t type = -1;

  explicit Matrix(void* h) : handle(h) {}
  Matrix(const Matrix&) = delete;
  ~Matrix() { torch_api.delete_tensor_object(handle); }

  // Whether the kernels can work on it.
  bool read() {
    int32_t number = -1;
    if (torch_api.get_dtype(handle, &number) || torch_api.get_data_ptr(handle, &data) ||
        torch_api.get_size(handle, 0, &rows) || torch_api.get_stride(handle, 0, &stride) ||
        torch_api.get_stride(handle, 1, &last))
      return false;
    for (int32_t i = 0; i < 3; i++)
      if (number == torch_api.types[i]) type = i;
    return type >= 0 && last == 1;
  }
  void release(uint64_t* place) { *place = (uint64_t)handle, handle = nullptr; }
};

// The number that a handle holds; -1: not to be read.
int64_t number_of(uint64_t handle) {
  void* data = nullptr;
  return torch_api.get_data_ptr((void*)handle, &data) || !data ? -1 : *(const int64_t*)data;
}

// Ends a tensor that the call was given.
void drop(uint64_t handle) { torch_api.delete_tensor_object((void*)handle); }

void python(const char* op, uint64_t* stack) {
  if (torch_api.call_dispatcher(op, "", stack))
    throw std::runtime_error(std::string(op) + " failed; the reason stands in the log");
}

// Arguments y, x and site, as PyTorch's boxed kernels of the stable interface take them.
void gated_lora_op(uint64_t* stack, uint64_t, uint64_t) {
  const int64_t site = number_of(stack[2]);
  if (site >= 0 && site < (int64_t)doors.size() && doors[site].active) {
    const Door door = doors[site];
    Matrix y((void*)stack[0]), x((void*)stack[1]);
    if (!*door.active) return drop(stack[2]);
    if (door.slots && y.read() && x.read()) {
      gated_lora(door.slots, door.num_slots, door.slots_T, std::min(x.rows, door.max_tokens),
                 x.data, x.stride, x.type, nullptr, nullptr, 0, door.given, door.given_stride, y.data,
                 y.stride, y.type);
      return drop(stack[2]);
    }
    y.release(&stack[0]), x.release(&stack[1]);
  }
  python("vllm_lora_ext::gated_lora_python_", stack);
}

// Arguments a, gate_up and block.
void mix_act_op(uint64_t* stack, uint64_t, uint64_t) {
  const int64_t block = number_of(stack[2]);
  if (block >= 0 && block < (int64_t)blocks.size() && blocks[block] && !*blocks[block]) {
    for (int i = 0; i < 3; i++) drop(stack[i]);
    return;
  }
  python("vllm_lora_ext::mix_act_python_", stack);
}

}  // namespace

extern "C" int64_t install_ops(const Torch* api) {
  static void* library;
  torch_api = *api;
  return api->library_init_impl("vllm_lora_ext", "CPU", __FILE__, __LINE__, &library) ||
         api->library_impl(library, "gated_lora_", gated_lora_op) ||
         api->library_impl(library, "mix_act_", mix_act_op);
}

extern "C" void set_block(int64_t block, const int64_t* busy) {
  if (block >= (int64_t)blocks.size()) blocks.resize(block + 1);
  blocks[block] = busy;
}

extern "C" void set_door(int64_t site, const Door* door) {
  if (site >= (int64_t)doors.size()) doors.resize(site + 1);
  doors[site] = *door;
}
