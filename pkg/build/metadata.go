package build

import (
	"errors"
	"fmt"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/sys/signal"
)

// This file has the instructions that do no more than set a field of the
// image's config.

func (d *dispatcher) dispatchLabel(c *instructions.LabelCommand) error {
	cfg := &d.state.config.Config
	if cfg.Labels == nil {
		cfg.Labels = map[string]string{}
	}
	said := "LABEL"
	for _, kv := range c.Labels {
		cfg.Labels[kv.Key] = kv.Value
		said += " " + kv.String()
	}
	d.commit(said, nil)
	return nil
}

func (d *dispatcher) dispatchMaintainer(c *instructions.MaintainerCommand) error {
	d.state.config.Author = c.Maintainer
	d.commit(fmt.Sprintf("MAINTAINER %v", c.Maintainer), nil)
	return nil
}

func (d *dispatcher) dispatchShell(c *instructions.ShellCommand) error {
	d.state.config.Config.Shell = c.Shell
	d.commit(fmt.Sprintf("SHELL %v", c.Shell), nil)
	return nil
}

func (d *dispatcher) dispatchStopSignal(c *instructions.StopSignalCommand) error {
	if _, err := signal.ParseSignal(c.Signal); err != nil {
		return err
	}
	d.state.config.Config.StopSignal = c.Signal
	d.commit(fmt.Sprintf("STOPSIGNAL %v", c.Signal), nil)
	return nil
}

func (d *dispatcher) dispatchUser(c *instructions.UserCommand) error {
	d.state.config.Config.User = c.User
	d.commit(fmt.Sprintf("USER %v", c.User), nil)
	return nil
}

// dispatchVolume notes where containers shall have volumes. It makes no
// directories, and later steps may change what is there.
func (d *dispatcher) dispatchVolume(c *instructions.VolumeCommand) error {
	cfg := &d.state.config.Config
	if cfg.Volumes == nil {
		cfg.Volumes = map[string]struct{}{}
	}
	for _, v := range c.Volumes {
		if v == "" {
			return errors.New("VOLUME specified can not be an empty string")
		}
		cfg.Volumes[v] = struct{}{}
	}
	d.commit(fmt.Sprintf("VOLUME %v", c.Volumes), nil)
	return nil
}

func (d *dispatcher) dispatchHealthcheck(c *instructions.HealthCheckCommand) error {
	h := dockerspec.HealthcheckConfig{
		Test: c.Health.Test, Interval: c.Health.Interval, Timeout: c.Health.Timeout,
		StartPeriod: c.Health.StartPeriod, StartInterval: c.Health.StartInterval, Retries: c.Health.Retries,
	}
	d.state.config.Config.Healthcheck = &h
	d.commit(fmt.Sprintf("HEALTHCHECK %+v", h), nil)
	return nil
}
