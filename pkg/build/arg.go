package build

import (
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

// dispatchArg declares build arguments. Their value is what the user has
// given, or the default, or that of the argument of the same name before the
// first FROM; without any of these the variable stays unset.
func (d *dispatcher) dispatchArg(c *instructions.ArgCommand) error {
	var said []string
	for _, arg := range c.Args {
		given, ok := d.plan.req.BuildArgs[arg.Key]
		switch {
		case ok:
			arg.Value = &given
		case arg.Value != nil:
			v, err := d.word(*arg.Value)
			if err != nil {
				return err
			}
			arg.Value = &v
		default:
			if v, ok := d.plan.globals.Get(arg.Key); ok {
				arg.Value = &v
			}
		}
		text := arg.Key
		if arg.Value != nil {
			d.state.env.set(arg.Key, *arg.Value)
			text += "=" + *arg.Value
		}
		d.state.args = append(d.state.args, arg)
		said = append(said, text)
	}
	d.commit("ARG "+strings.Join(said, " "), nil)
	return nil
}
