package build

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

// withShell is the command line of a shell form.
func (s *state) withShell(args []string) []string {
	sh := s.config.Config.Shell
	if len(sh) == 0 {
		sh = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(sh), strings.Join(args, " "))
}

// dispatchCmd sets what containers run, or the arguments of their entrypoint.
func (d *dispatcher) dispatchCmd(c *instructions.CmdCommand) error {
	args := []string(c.CmdLine)
	if c.PrependShell {
		args = d.state.withShell(args)
	}
	d.state.config.Config.Cmd = args
	//lint:ignore SA1019 other builders set it
	d.state.config.Config.ArgsEscaped = true
	d.state.cmdSet = true
	d.commit(fmt.Sprintf("CMD %q", args), nil)
	return nil
}

// dispatchEntrypoint sets what containers run. A CMD that the stage has
// inherited belongs to another entrypoint and goes.
func (d *dispatcher) dispatchEntrypoint(c *instructions.EntrypointCommand) error {
	args := []string(c.CmdLine)
	if c.PrependShell {
		args = d.state.withShell(args)
	}
	d.state.config.Config.Entrypoint = args
	if !d.state.cmdSet {
		d.state.config.Config.Cmd = nil
	}
	d.commit(fmt.Sprintf("ENTRYPOINT %q", args), nil)
	return nil
}
