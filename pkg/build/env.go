package build

import (
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

// environment is a list of variables. The one set last comes last. It is
// copied, never shared. It implements shell.EnvGetter.
type environment struct {
	keys   []string
	values map[string]string
}

func (e *environment) clone() *environment {
	c := &environment{keys: slices.Clone(e.keys), values: make(map[string]string, len(e.values))}
	for k, v := range e.values {
		c.values[k] = v
	}
	return c
}

// set gives a variable a value.
func (e *environment) set(key, value string) {
	if e.values == nil {
		e.values = map[string]string{}
	}
	if _, ok := e.values[key]; ok {
		e.keys = slices.DeleteFunc(e.keys, func(k string) bool { return k == key })
	}
	e.keys = append(e.keys, key)
	e.values[key] = value
}

// Get returns a variable's value and whether it is set.
func (e *environment) Get(key string) (string, bool) {
	v, ok := e.values[key]
	return v, ok
}

// Keys returns the names of the variables in order.
func (e *environment) Keys() []string { return e.keys }

// list returns the variables as a process has them.
func (e *environment) list() []string {
	out := make([]string, 0, len(e.keys))
	for _, k := range e.keys {
		out = append(out, k+"="+e.values[k])
	}
	return out
}

// setInList gives a variable of an image's config a value, in its place if it
// has one.
func setInList(env []string, key, value string) []string {
	for i, kv := range env {
		if k, _, _ := strings.Cut(kv, "="); k == key {
			env = slices.Clone(env)
			env[i] = key + "=" + value
			return env
		}
	}
	return append(slices.Clip(env), key+"="+value)
}

// dispatchEnv sets variables for the commands that follow and for the image.
func (d *dispatcher) dispatchEnv(c *instructions.EnvCommand) error {
	said := "ENV"
	for _, kv := range c.Env {
		d.state.env.set(kv.Key, kv.Value)
		d.state.config.Config.Env = setInList(d.state.config.Config.Env, kv.Key, kv.Value)
		said += " " + kv.String()
	}
	d.commit(said, nil)
	return nil
}
