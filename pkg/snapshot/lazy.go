package snapshot

import (
	"context"
	"io"
	"sync"
)

// NewLazyView returns a view that is made, by open, when it is first asked for
// something. If open fails, so does everything that is asked.
func NewLazyView(open func() (View, error)) View {
	return &lazyView{open: sync.OnceValues(open)}
}

type lazyView struct{ open func() (View, error) }

func (v *lazyView) Lstat(path string) (Entry, error) {
	view, err := v.open()
	if err != nil {
		return Entry{}, err
	}
	return view.Lstat(path)
}

func (v *lazyView) ReadDir(path string) ([]Entry, error) {
	view, err := v.open()
	if err != nil {
		return nil, err
	}
	return view.ReadDir(path)
}

func (v *lazyView) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	view, err := v.open()
	if err != nil {
		return nil, err
	}
	return view.Open(ctx, path)
}
