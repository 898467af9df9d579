package build

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

// dispatchExpose notes which ports containers listen on. Variables are
// expanded before words are split, so that one can hold several ports.
func (d *dispatcher) dispatchExpose(c *instructions.ExposeCommand) error {
	var ports []string
	for _, word := range c.Ports {
		words, err := d.plan.lex.ProcessWords(word, d.state.env)
		if err != nil {
			return err
		}
		for _, w := range words {
			p, err := parsePort(w)
			if err != nil {
				return err
			}
			ports = append(ports, p...)
		}
	}
	cfg := &d.state.config.Config
	if cfg.ExposedPorts == nil {
		cfg.ExposedPorts = map[string]struct{}{}
	}
	for _, p := range ports {
		cfg.ExposedPorts[p] = struct{}{}
	}
	d.commit(fmt.Sprintf("EXPOSE %v", ports), nil)
	return nil
}

// parsePort reads "[[ip:]host:]port[-end][/protocol]" and returns each port as
// "port/protocol". Address and host port mean nothing here, but must be valid.
func parsePort(spec string) ([]string, error) {
	ip, host, port := "", "", spec
	if parts := strings.Split(spec, ":"); len(parts) > 1 {
		n := len(parts)
		host, port = parts[n-2], parts[n-1]
		ip = strings.Join(parts[:n-2], ":")
	}
	port, proto, _ := strings.Cut(port, "/")
	proto = strings.ToLower(proto)
	switch {
	case port == "":
		return nil, fmt.Errorf("invalid port: %q: no port specified", spec)
	case proto == "":
		proto = "tcp"
	case proto != "tcp" && proto != "udp" && proto != "sctp":
		return nil, fmt.Errorf("invalid port: %q: invalid proto: %s", spec, spec[strings.IndexByte(spec, '/')+1:])
	}
	bare := strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
	if ip != "" && net.ParseIP(bare) == nil {
		return nil, errors.New("invalid IP address: " + bare)
	}
	first, last, err := portRange(port)
	if err != nil {
		return nil, errors.New("invalid containerPort: " + port)
	}
	if host != "" {
		hostFirst, hostLast, err := portRange(host)
		if err != nil {
			return nil, errors.New("invalid hostPort: " + host)
		}
		if last-first != hostLast-hostFirst && last != first {
			return nil, fmt.Errorf("invalid ranges specified for container and host Ports: %s and %s", port, host)
		}
	}
	var out []string
	for n := first; n <= last; n++ {
		out = append(out, strconv.Itoa(n)+"/"+proto)
	}
	return out, nil
}

func portRange(s string) (first, last int, err error) {
	start, end, isRange := strings.Cut(s, "-")
	if first, err = portNumber(start); err != nil {
		return 0, 0, err
	}
	last = first
	if isRange {
		last, err = portNumber(end)
	}
	if err == nil && last < first {
		err = errors.New("the range is empty")
	}
	return first, last, err
}

func portNumber(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	return int(n), err
}
