// What happens before and after the edges, and the entrance to all kernels.
#include "launcher.h"
