package build

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// buildContext is the directory that COPY and ADD take files from, as far as
// the ignore file lets it be seen.
type buildContext struct {
	view    snapshot.View
	digests contentDigests
}

// openContext opens the context directory of a request. The ignore file is
// the one beside the Dockerfile that is named after it, even if it is empty,
// or else .dockerignore in the context.
func openContext(req *Request) (*buildContext, error) {
	fi, err := os.Stat(req.Context)
	if err != nil {
		return nil, fmt.Errorf("build context: %w", err)
	}
	if !fi.IsDir() {
		return nil, fmt.Errorf("build context: %s is not a directory", req.Context)
	}
	for _, name := range []string{req.Dockerfile + ".dockerignore", filepath.Join(req.Context, ".dockerignore")} {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ignore file: %w", err)
		}
		defer f.Close()
		patterns, err := ignorefile.ReadAll(f)
		if err != nil {
			return nil, fmt.Errorf("ignore file %s: %w", name, err)
		}
		filter, err := ignoreFilter(patterns)
		if err != nil {
			return nil, fmt.Errorf("ignore file %s: %w", name, err)
		}
		return &buildContext{view: snapshot.NewDirView(req.Context, filter)}, nil
	}
	return &buildContext{view: snapshot.NewDirView(req.Context, nil)}, nil
}

// ignoreFilter returns the filter that leaves out what the patterns of an
// ignore file match. nil leaves out nothing.
func ignoreFilter(patterns []string) (snapshot.Filter, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	pm, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, err
	}
	f := &ignores{pm: pm, dirs: map[string]patternmatcher.MatchInfo{}}
	return f.verdict, nil
}

// ignores matches paths against patterns of which the last one that matches
// counts. What is known of a directory decides for what is below it.
type ignores struct {
	pm   *patternmatcher.PatternMatcher
	mu   sync.Mutex
	dirs map[string]patternmatcher.MatchInfo
}

func (f *ignores) verdict(path string, isDir bool) (snapshot.Verdict, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	above, err := f.infoOf(dirOf(path))
	if err != nil {
		return 0, err
	}
	ignored, info, err := f.pm.MatchesUsingParentResults(path, above)
	if err != nil {
		return 0, err
	}
	if isDir {
		f.dirs[path] = info
	}
	switch {
	case !ignored:
		return snapshot.Keep, nil
	case isDir && f.pm.Exclusions():
		return snapshot.Descend, nil
	}
	return snapshot.Skip, nil
}

// infoOf returns what matching has found out about a directory. f.mu is held.
func (f *ignores) infoOf(dir string) (patternmatcher.MatchInfo, error) {
	if dir == "" {
		return patternmatcher.MatchInfo{}, nil
	}
	if info, ok := f.dirs[dir]; ok {
		return info, nil
	}
	above, err := f.infoOf(dirOf(dir))
	if err != nil {
		return patternmatcher.MatchInfo{}, err
	}
	_, info, err := f.pm.MatchesUsingParentResults(dir, above)
	f.dirs[dir] = info
	return info, err
}

func dirOf(path string) string {
	i := strings.LastIndexByte(path, '/')
	return path[:max(i, 0)]
}
