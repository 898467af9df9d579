package build

import (
	"errors"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/util/suggest"
)

// dispatchOnbuild stores an instruction for the images that will start from
// this one.
func (d *dispatcher) dispatchOnbuild(c *instructions.OnbuildCommand) error {
	d.state.config.Config.OnBuild = append(d.state.config.Config.OnBuild, c.Expression)
	return nil
}

// takeOnbuild puts what the base images and stages have stored with ONBUILD
// in front of the instructions of the stages that start from them. It returns
// whether that has made new stages or images necessary.
func (p *plan) takeOnbuild() (more bool, err error) {
	for _, st := range p.needed() {
		if st.onbuildDone {
			continue
		}
		st.onbuildDone = true
		var triggers []string
		if st.image != nil && !st.external {
			triggers = st.image.config.Config.OnBuild
		}
		if st.from != nil {
			for _, cmd := range st.from.commands {
				if c, ok := cmd.Command.(*instructions.OnbuildCommand); ok {
					triggers = append(triggers, c.Expression)
				}
			}
		}
		var commands []command
		for _, text := range triggers {
			cmd, err := parseTrigger(text, st.where)
			if err != nil {
				return false, p.file.errorAt(st.where, err)
			}
			if err := p.link(st, cmd); err != nil {
				return false, p.file.errorAt(st.where, err)
			}
			more = more || len(cmd.sources) > 0
			commands = append(commands, *cmd)
		}
		st.commands = append(commands, st.commands...)
	}
	return more, nil
}

// parseTrigger parses what an ONBUILD has stored. Its place is that of the
// FROM that has brought it.
func parseTrigger(text string, where []parser.Range) (*command, error) {
	ast, err := parser.Parse(strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	if len(ast.AST.Children) != 1 {
		return nil, errors.New("onbuild trigger should be a single expression")
	}
	node := ast.AST.Children[0]
	if len(where) > 0 {
		node.StartLine, node.EndLine = where[0].Start.Line, where[len(where)-1].End.Line
	}
	c, err := instructions.ParseCommand(node)
	if err != nil {
		return nil, err
	}
	return &command{Command: c, onbuild: true}, nil
}

// suggestStage adds to an error about an image the name of a stage, or of an
// image that many use, that was perhaps meant.
func (p *plan) suggestStage(name string, err error) error {
	common := []string{"alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"}
	return suggest.WrapError(err, name, append(p.names(), common...), true)
}
