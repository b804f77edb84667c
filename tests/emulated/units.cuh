// In the place of the kernel's: nobody has attention to share here.
#pragma once
#include "roles.cuh"

template <class M>
struct Units {
  static void lay(const Block<M>&) {}
};
