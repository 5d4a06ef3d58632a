// SPDX-License-Identifier: MIT
/*
 * ktls._ktls.Intake: what a receive costs when there is nothing to think about
 *
 * A KernelReceiver (ktls/receiving.py) has to look after records that are no
 * data, messages in parts, errors that the kernel tells once, answers that are
 * owed. Most receives meet none of that. Here these are one recvmsg in C: it
 * gives data, or None, and then Python takes its time.
 *
 * What there is to think about is told by `attention`, as in _lane.c. What was
 * received and isn't plain data is in `kept` before Python runs again, so that
 * no signal handler can make it get lost.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <sys/socket.h>

#include "_lane.h"
#include "ktls.h"

struct intake {
	PyObject_HEAD int fd;
	char attention;
	PyObject *kept; /* a list: (content, type, end), or a call's errno */
};

static int intake_init(PyObject *object, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "fd", NULL };
	struct intake *intake = (struct intake *)object;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "i", names,
					 &intake->fd))
		return -1;
	if (!intake->kept)
		intake->kept = PyList_New(0);
	return intake->kept ? 0 : -1;
}

static void intake_dealloc(PyObject *object)
{
	struct intake *intake = (struct intake *)object;
	PyTypeObject *type = Py_TYPE(object);

	Py_CLEAR(intake->kept);
	type->tp_free(object);
	Py_DECREF(type);
}

/* Leaves to Python what isn't plain data, or isn't any more by now. */
static int keep(struct intake *intake, const void *content, ssize_t n,
		const struct ktls_record *record)
{
	PyObject *entry;
	int error;

	intake->attention = 1;
	if (n < 0)
		entry = PyLong_FromLong((long)-n);
	else
		entry = Py_BuildValue("(y#iN)", content, (Py_ssize_t)n,
				      (int)record->type,
				      PyBool_FromLong(record->end));
	if (!entry)
		return -1;
	error = PyList_Append(intake->kept, entry);
	Py_DECREF(entry);
	return error;
}

/* One recvmsg: how many bytes of data, 0 if Python has to look, or -1. */
static Py_ssize_t receive(struct intake *intake, void *buffer, size_t size,
			  int flags)
{
	struct ktls_record record;
	ssize_t n;

	Py_BEGIN_ALLOW_THREADS;
	n = ktls_recv_record(intake->fd, buffer, size, flags, &record);
	Py_END_ALLOW_THREADS;
	if (n == -EAGAIN || n == -EINTR)
		return 0;
	if (n > 0 && record.type == KTLS_RECORD_DATA && !intake->attention)
		return n;
	return keep(intake, buffer, n, &record);
}

static int is_open(const struct intake *intake)
{
	return !intake->attention && intake->fd >= 0 && intake->kept;
}

/*
 * 0 or MSG_DONTWAIT; -1 for all others, which take thought: with MSG_TRUNC, for
 * instance, more bytes are counted than written, unless TLS is there.
 */
static int flags_of(PyObject *number)
{
	long flags = PyLong_AsLong(number);

	return flags & ~(long)MSG_DONTWAIT ? -1 : (int)flags;
}

PyDoc_STRVAR(recv_doc, "recv($self, size, flags, /)\n--\n\n"
		       "Receives data, if there is nothing to think about.");

static PyObject *intake_recv(PyObject *object, PyObject *const *args,
			     Py_ssize_t given)
{
	struct intake *intake = (struct intake *)object;
	PyObject *data;
	Py_ssize_t size, n;
	int flags;

	if (given != 2) {
		PyErr_SetString(PyExc_TypeError, "recv takes 2 arguments");
		return NULL;
	}
	flags = flags_of(args[1]);
	if (PyErr_Occurred())
		return NULL;
	if (flags < 0 || !is_open(intake) || !PyLong_CheckExact(args[0]))
		Py_RETURN_NONE;
	size = PyLong_AsSsize_t(args[0]);
	if (PyErr_Occurred())
		return NULL;
	if (size <= 0)
		Py_RETURN_NONE;
	data = PyBytes_FromStringAndSize(NULL, size);
	if (!data)
		return NULL;
	n = receive(intake, PyBytes_AS_STRING(data), (size_t)size, flags);
	if (n <= 0) {
		Py_DECREF(data);
		return n ? NULL : Py_NewRef(Py_None);
	}
	if (n < size)
		_PyBytes_Resize(&data, n); /* NULL if it fails */
	return data;
}

PyDoc_STRVAR(
	recv_into_doc,
	"recv_into($self, buffer, flags, /)\n--\n\n"
	"Receives data into a buffer, if there is nothing to think about.");

static PyObject *intake_recv_into(PyObject *object, PyObject *const *args,
				  Py_ssize_t given)
{
	struct intake *intake = (struct intake *)object;
	Py_buffer view;
	Py_ssize_t n = 0;
	int flags;

	if (given != 2) {
		PyErr_SetString(PyExc_TypeError, "recv_into takes 2 arguments");
		return NULL;
	}
	flags = flags_of(args[1]);
	if (PyErr_Occurred())
		return NULL;
	if (flags < 0 || !is_open(intake))
		Py_RETURN_NONE;
	if (PyObject_GetBuffer(args[0], &view, PyBUF_WRITABLE)) {
		PyErr_Clear();
		Py_RETURN_NONE; /* Python says what is wrong with it */
	}
	if (view.len)
		n = receive(intake, view.buf, (size_t)view.len, flags);
	PyBuffer_Release(&view);
	if (n <= 0)
		return n ? NULL : Py_NewRef(Py_None);
	return PyLong_FromSsize_t(n);
}

static PyMethodDef methods[] = {
	{ "recv", (PyCFunction)(void (*)(void))intake_recv, METH_FASTCALL,
	  recv_doc },
	{ "recv_into", (PyCFunction)(void (*)(void))intake_recv_into,
	  METH_FASTCALL, recv_into_doc },
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
	{ "fd", T_INT, offsetof(struct intake, fd), 0, NULL },
	{ "attention", T_BOOL, offsetof(struct intake, attention), 0, NULL },
	{ "kept", T_OBJECT_EX, offsetof(struct intake, kept), READONLY, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot slots[] = {
	{ Py_tp_doc, "The way of receives that there is nothing to think of." },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_init, intake_init },
	{ Py_tp_dealloc, intake_dealloc },
	{ Py_tp_methods, methods },
	{ Py_tp_members, members },
	{ 0, NULL },
};

static PyType_Spec spec = {
	.name = "ktls._ktls.Intake",
	.basicsize = sizeof(struct intake),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};

PyObject *ktls_intake_type(void)
{
	return PyType_FromSpec(&spec);
}
