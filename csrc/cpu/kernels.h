// The table of an instruction set's kernels.
#pragma once

#include "aggregate.h"
#include "attend.h"
#include "evaluate.h"
#include "fold.h"
#include "gradients.h"
#include "node_map.h"

namespace ngk {

template <class V>
Kernels kernels_of() {
  return {
      [](const Call& c, Parallel p, int n) { Aggregate<V>(c, p, n)(); },
      [](const Call& c, Parallel p, int n) { Evaluate<V>(c, p, n)(); },
      [](const Call& c, Parallel p, int n) { Attend<V>(c, p, n)(); },
      [](const Call& c, Parallel p, int n) { Gradients<V>(c, p, n)(); },
      [](const NodeCall& c, Parallel p, int n) { NodeMap<V>(c, p, n)(); },
      [](const NodeCall& c, Parallel p, int n) { NodeGradients<V>(c, p, n)(); },
      [](const Call& c, bool backward) { return Engine<V>::workspace(c, backward); },
  };
}

}  // namespace ngk
