// SPDX-License-Identifier: MIT
/*
 * ktls._ktls.by_lane: a method that asks its object's lane first
 *
 * For small files a Python function that asks a Lane (_lane.c) takes longer than
 * asking does. by_lane(function) wraps it, as functools.lru_cache does: a call of
 * the usual form goes to the lane without one, and to the function only with what
 * the lane leaves to thought.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "_lane.h"

struct by_lane {
	PyObject_HEAD vectorcallfunc call;
	PyObject *function, *attributes, *weak_references;
};

/* Kept for as long as the process lives. */
static PyObject *name_lane, *zero;
static PyTypeObject *type_of_all;

/* A call (object, file, offset=0, count=None); None: the lane didn't do it. */
static PyObject *ask_lane(PyObject *const *args, Py_ssize_t given)
{
	PyObject *lane = PyObject_GetAttr(args[0], name_lane), *done;

	if (!lane)
		return NULL;
	done = ktls_is_lane(lane)
		       ? ktls_lane_sendfile(lane, args[0], args[1],
					    given > 2 ? args[2] : zero,
					    given > 3 ? args[3] : Py_None)
		       : Py_NewRef(Py_None);
	Py_DECREF(lane);
	return done;
}

static PyObject *by_lane_call(PyObject *object, PyObject *const *args,
			      size_t nargsf, PyObject *keywords)
{
	Py_ssize_t given = PyVectorcall_NARGS(nargsf);

	if (!keywords && given >= 2 && given <= 4) {
		PyObject *done = ask_lane(args, given);

		if (done != Py_None)
			return done; /* NULL, too */
		Py_DECREF(done);
	}
	return PyObject_Vectorcall(((struct by_lane *)object)->function, args,
				   nargsf, keywords);
}

static PyObject *by_lane_get(PyObject *object, PyObject *owner, PyObject *type)
{
	(void)type;
	return owner ? PyMethod_New(object, owner) : Py_NewRef(object);
}

/* Copied and pickled by its name, as functions are. */
static PyObject *by_lane_reduce(PyObject *object, PyObject *unused)
{
	(void)unused;
	return PyObject_GetAttrString(object, "__qualname__");
}

static int by_lane_traverse(PyObject *object, visitproc visit, void *arg)
{
	struct by_lane *by_lane = (struct by_lane *)object;

	Py_VISIT(Py_TYPE(object));
	Py_VISIT(by_lane->function);
	Py_VISIT(by_lane->attributes);
	return 0;
}

static int by_lane_clear(PyObject *object)
{
	struct by_lane *by_lane = (struct by_lane *)object;

	Py_CLEAR(by_lane->attributes);
	return 0;
}

static void by_lane_dealloc(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	PyObject_GC_UnTrack(object);
	PyObject_ClearWeakRefs(object);
	by_lane_clear(object);
	Py_CLEAR(((struct by_lane *)object)->function);
	type->tp_free(object);
	Py_DECREF(type);
}

static PyMethodDef methods[] = {
	{ "__reduce__", by_lane_reduce, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef getters[] = {
	{ "__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL,
	  NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyMemberDef members[] = {
	{ "__vectorcalloffset__", T_PYSSIZET, offsetof(struct by_lane, call),
	  READONLY, NULL },
	{ "__dictoffset__", T_PYSSIZET, offsetof(struct by_lane, attributes),
	  READONLY, NULL },
	{ "__weaklistoffset__", T_PYSSIZET,
	  offsetof(struct by_lane, weak_references), READONLY, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot slots[] = {
	{ Py_tp_call, PyVectorcall_Call },
	{ Py_tp_descr_get, by_lane_get },
	{ Py_tp_methods, methods },
	{ Py_tp_getset, getters },
	{ Py_tp_traverse, by_lane_traverse },
	{ Py_tp_clear, by_lane_clear },
	{ Py_tp_dealloc, by_lane_dealloc },
	{ Py_tp_members, members },
	{ 0, NULL },
};

static PyType_Spec spec = {
	.name = "ktls._ktls.ByLane",
	.basicsize = sizeof(struct by_lane),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
		 Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR |
		 Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = slots,
};

/* functools.update_wrapper(made, function) */
static int update_wrapper(PyObject *made, PyObject *function)
{
	PyObject *functools = PyImport_ImportModule("functools"), *done = NULL;

	if (functools)
		done = PyObject_CallMethod(functools, "update_wrapper", "OO",
					   made, function);
	Py_XDECREF(functools);
	Py_XDECREF(done);
	return done ? 0 : -1;
}

PyObject *ktls_by_lane(PyObject *function)
{
	struct by_lane *made;

	if (!type_of_all) {
		name_lane = PyUnicode_InternFromString("_lane");
		zero = PyLong_FromLong(0);
		type_of_all = (PyTypeObject *)PyType_FromSpec(&spec);
		if (!name_lane || !zero || !type_of_all)
			return NULL;
	}
	made = PyObject_GC_New(struct by_lane, type_of_all);
	if (!made)
		return NULL;
	made->call = by_lane_call;
	made->function = Py_NewRef(function);
	made->attributes = NULL;
	made->weak_references = NULL;
	PyObject_GC_Track(made);
	if (!update_wrapper((PyObject *)made, function))
		return (PyObject *)made;
	Py_DECREF(made);
	return NULL;
}
