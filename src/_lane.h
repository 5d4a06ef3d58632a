/* SPDX-License-Identifier: MIT */
#ifndef KTLS_LANE_H
#define KTLS_LANE_H

#include <Python.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The class ktls._ktls.Lane, new; NULL with an exception set. */
PyObject *ktls_lane_type(void);

#ifdef __cplusplus
}
#endif

#endif
