// Per-thread working memory that outlives a call: fresh pages would cost as much as a small operation.
#pragma once
#include <cstdint>

namespace lalora {

enum Slot { kShared = 0, kWork = 1, kSlots = 2 };  // of the whole call (its calling thread), of one thread

// At least `floats` floats, 64-byte aligned, uninitialised, valid until the thread asks for the slot again.
float* scratch(Slot slot, int64_t floats);

}  // namespace lalora
