package build

import (
	"context"
	"sync"
)

// call is something that is found out once, by whoever asks first, for all who
// ask. The zero value is ready.
type call[T any] struct {
	mu    sync.Mutex
	done  chan struct{}
	value T
	err   error
}

// do returns what fn returns, calling it only if nobody has before. Others
// wait as long as their ctx lasts.
func (c *call[T]) do(ctx context.Context, fn func() (T, error)) (T, error) {
	c.mu.Lock()
	first := c.done == nil
	if first {
		c.done = make(chan struct{})
	}
	c.mu.Unlock()
	if first {
		c.value, c.err = fn()
		close(c.done)
		return c.value, c.err
	}
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
		var zero T
		return zero, context.Cause(ctx)
	}
}

// promise is a value that somebody will have.
type promise[T any] struct {
	done  chan struct{}
	value T
	err   error
}

func newPromise[T any]() *promise[T] { return &promise[T]{done: make(chan struct{})} }

// keep sets the value. It must be called exactly once.
func (p *promise[T]) keep(v T, err error) {
	p.value, p.err = v, err
	close(p.done)
}

// wait returns the value when it is there.
func (p *promise[T]) wait(ctx context.Context) (T, error) {
	select {
	case <-p.done:
		return p.value, p.err
	case <-ctx.Done():
		var zero T
		return zero, context.Cause(ctx)
	}
}
