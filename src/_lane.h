/* SPDX-License-Identifier: MIT */
#ifndef KTLS_LANE_H
#define KTLS_LANE_H

#include <Python.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The classes Lane and Intake of ktls._ktls, new; NULL: an exception is set. */
PyObject *ktls_lane_type(void);
PyObject *ktls_intake_type(void);

#ifdef __cplusplus
}
#endif

#endif
