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

/* Lane.sendfile() of an object that is a Lane. */
int ktls_is_lane(PyObject *object);
PyObject *ktls_lane_sendfile(PyObject *lane, PyObject *owner, PyObject *file,
			     PyObject *offset, PyObject *count);

/* by_lane() of ktls._ktls. */
PyObject *ktls_by_lane(PyObject *function);

#ifdef __cplusplus
}
#endif

#endif
