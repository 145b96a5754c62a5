// Every CPU can run the emulation.
#include "cpu_x86.h"

bool lzn::has_avx_vnni() { return true; }
