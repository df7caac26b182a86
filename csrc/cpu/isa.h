// The kernels of each instruction set compiled in, and the one in use.
#pragma once
#include "../lalora.h"

namespace lalora {

struct Isa {
    const char* name;
    Kernels kernels;
    bool (*supported)();  // by this CPU and its operating system
};

extern const Isa kIsas[];  // widest first
extern const int kIsaCount;

const Isa& current_isa();  // the widest that is supported, until set_isa
void set_isa(const Isa& isa);

}  // namespace lalora
