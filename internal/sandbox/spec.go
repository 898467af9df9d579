package sandbox

import (
	"fmt"
	"io"
)

// A Spec says what to run, and in which surroundings.
type Spec struct {
	Root Rootfs
	// Args is the command. Without a slash in it, Args[0] is looked up in the
	// PATH of Env, inside the root.
	Args []string
	// Env is the whole environment, but for HOME, which is added from the
	// root's /etc/passwd if it is absent.
	Env []string
	// Dir is the working directory. It is made, owned by User, if missing.
	Dir string
	// User is a name or number, with an optional group behind a colon, as
	// /etc/passwd and /etc/group of the root have them. "" is root.
	User string
	// Hostname is the name of the machine that the process sees.
	Hostname string
	// Mounts are made in order. Mount points that do not exist are made, and
	// removed again afterwards if they are still empty.
	Mounts []Mount
	// Stdout and Stderr take the output; nil discards it. Standard input is
	// empty.
	Stdout, Stderr io.Writer `json:"-"`
}

// Rootfs is the file system that the process has as its root.
type Rootfs struct {
	// Lower holds the trees of layers, topmost first, in overlayfs's format
	// with user.overlay marks.
	Lower []string
	// Upper takes the changes, and Work is overlayfs's scratch directory on
	// the same file system. Both must be empty.
	Upper, Work string
	// MountPoint is an empty directory where the root is put together. The
	// mount is not visible outside the sandbox.
	MountPoint string
}

// A Mount makes a file or directory of the machine appear in the root.
type Mount struct {
	Source   string
	Target   string
	ReadOnly bool
}

// ExitError says that the process ran and did not succeed.
type ExitError struct {
	// Code is the exit code as a shell gives it: 128 plus the signal's number
	// for a process that was killed, 127 for a command that does not exist and
	// 126 for one that cannot be executed.
	Code int
	// Reason is set where the code alone does not say what happened.
	Reason string
}

func (e *ExitError) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("exit code: %d: %s", e.Code, e.Reason)
	}
	return fmt.Sprintf("exit code: %d", e.Code)
}
