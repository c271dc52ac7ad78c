// The files of this folder, for the modules that are made of them. Each binds the ops of one header
// of include/segk.
#pragma once

#include <pybind11/pybind11.h>

void bind_segments(pybind11::module_& m);
void bind_bradley_terry(pybind11::module_& m);
void bind_rewards(pybind11::module_& m);
void bind_gae(pybind11::module_& m);
void bind_advantages(pybind11::module_& m);
void bind_whiten(pybind11::module_& m);
void bind_ppo_loss(pybind11::module_& m);
void bind_running_normalizer(pybind11::module_& m);
void bind_normalizer_fit(pybind11::module_& m);  // the CUDA module only
void bind_vocab(pybind11::module_& m);           // CPU modules only

// The ops that CPUs and GPUs have.
inline void bind_sequence_ops(pybind11::module_& m) {
  bind_segments(m);
  bind_bradley_terry(m);
  bind_rewards(m);
  bind_gae(m);
  bind_advantages(m);
  bind_whiten(m);
  bind_ppo_loss(m);
  bind_running_normalizer(m);
}
