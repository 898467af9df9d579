// Package ondol_test checks the rules that hold for the whole source: which
// package may import which, and what only a command may do. They are those of
// docs/architecture.md.
package ondol_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/ondol-dev/ondol/"

// mayImport lists, for each package, what it may import of this module. Imports
// go down this list only. Tests may import internal/imagetest and the package
// that they test besides.
var mayImport = map[string][]string{
	"cmd/builder":         {"internal/cli", "internal/progress", "internal/registry", "internal/sandbox", "pkg/build", "pkg/cache", "pkg/snapshot"},
	"cmd/warmer":          {"internal/cli", "internal/progress", "internal/registry", "pkg/build", "pkg/cache", "pkg/warm"},
	"internal/cli":        {"internal/progress", "internal/registry", "internal/sandbox", "pkg/build"},
	"pkg/build":           {"internal/progress", "internal/registry", "internal/sandbox", "pkg/cache", "pkg/snapshot"},
	"pkg/warm":            {"internal/progress", "internal/registry", "pkg/cache", "pkg/cache/catalog", "pkg/snapshot"},
	"pkg/cache/cachetest": {"pkg/cache"},
	"pkg/cache":           {"internal/registry", "pkg/snapshot"},
	"pkg/cache/catalog":   {},
	"pkg/snapshot":        {},
	"internal/imagetest":  {},
	"internal/progress":   {},
	"internal/registry":   {},
	"internal/sandbox":    {},
}

// onlyIn lists, for packages of others, where alone they may be imported. The
// longest prefix counts; nil means nowhere.
var onlyIn = map[string][]string{
	"github.com/spf13/":            {"cmd", "internal/cli"},
	"github.com/dgraph-io/badger/": {"pkg/cache/catalog"},
	// BuildKit is taken for its reading of the language, never for its engine.
	"github.com/moby/buildkit/":                                   nil,
	"github.com/moby/buildkit/frontend/dockerfile/parser":         {"pkg/build"},
	"github.com/moby/buildkit/frontend/dockerfile/instructions":   {"pkg/build"},
	"github.com/moby/buildkit/frontend/dockerfile/shell":          {"pkg/build"},
	"github.com/moby/buildkit/frontend/dockerfile/linter":         {"pkg/build"},
	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil":      {"pkg/build"},
	"github.com/moby/buildkit/util/suggest":                       {"pkg/build"},
	"github.com/moby/buildkit/util/system":                        {"pkg/build"},
	"github.com/google/go-containerregistry/":                     {"internal/registry", "internal/imagetest"},
	"github.com/google/go-containerregistry/pkg/crane":            nil,
	"github.com/google/go-containerregistry/pkg/v1/daemon":        nil,
	"github.com/google/go-containerregistry/pkg/authn/kubernetes": nil,
}

// onlyCommands are functions that only commands may call: they read or change
// what belongs to the whole process.
var onlyCommands = []string{
	"os.Getenv", "os.LookupEnv", "os.Environ", "os.Setenv", "os.Unsetenv", "os.Chdir", "os.Exit",
	"log.Fatal", "log.Fatalf", "log.Panic", "log.Panicf",
}

// exempt are the places that may call them nevertheless, with the reason.
var exempt = map[string]string{
	"internal/sandbox/init_linux.go os.Exit": "it is PID 1 of a sandbox, a process of its own",
}

type source struct {
	path, pkg string
	test      bool
	file      *ast.File
	fset      *token.FileSet
}

// sources parses every Go file of the main module.
func sources(t *testing.T) []source {
	t.Helper()
	var out []source
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (slices.Contains([]string{"benchmarks", "tools", "testdata", ".git"}, d.Name())) {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || filepath.Dir(path) == "." {
			return nil
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution|parser.ParseComments)
		if err != nil {
			return err
		}
		out = append(out, source{path: path, pkg: filepath.ToSlash(filepath.Dir(path)), test: strings.HasSuffix(path, "_test.go"), file: file, fset: fset})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 50 {
		t.Fatalf("found only %d Go files: is this the root of the module?", len(out))
	}
	return out
}

func TestImportDirections(t *testing.T) {
	for _, s := range sources(t) {
		for _, spec := range s.file.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if problem := checkImport(s, path); problem != "" {
				t.Errorf("%s: %s", s.fset.Position(spec.Pos()), problem)
			}
		}
	}
}

func checkImport(s source, path string) string {
	if in, ok := strings.CutPrefix(path, module); ok {
		allowed, listed := mayImport[s.pkg]
		switch {
		case slices.Contains(allowed, in):
		case s.test && (in == s.pkg || in == "internal/imagetest" || in == "pkg/cache/cachetest"):
		case s.pkg == "cmd" && s.test: // scripts run everything
		case !listed:
			return fmt.Sprintf("package %s is new: say in house_test.go what it may import", s.pkg)
		default:
			return fmt.Sprintf("package %s must not import %s", s.pkg, in)
		}
		return ""
	}
	prefix := ""
	for p := range onlyIn {
		if strings.HasPrefix(path, p) && len(p) > len(prefix) {
			prefix = p
		}
	}
	if prefix == "" {
		return ""
	}
	for _, p := range onlyIn[prefix] {
		if s.pkg == p || strings.HasPrefix(s.pkg, p+"/") {
			return ""
		}
	}
	return fmt.Sprintf("package %s must not import %s: only %v may", s.pkg, path, onlyIn[prefix])
}

func TestProcessStateBelongsToCommands(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || strings.HasPrefix(s.pkg, "cmd/") || s.pkg == "internal/cli" || s.pkg == "internal/imagetest" {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Name.Name == "init" && n.Recv == nil {
					t.Errorf("%s: no init functions: what a package needs is given to it", s.fset.Position(n.Pos()))
				}
			case *ast.CallExpr:
				name := callee(n)
				if _, ok := exempt[s.path+" "+name]; ok {
					return true
				}
				if name == "panic" || slices.Contains(onlyCommands, name) {
					t.Errorf("%s: %s is for commands only", s.fset.Position(n.Pos()), name)
				}
			}
			return true
		})
	}
}

// callee is the name of the function that is called, with that of its package.
func callee(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok {
			return x.Name + "." + f.Sel.Name
		}
	}
	return ""
}

// Every package says what it is for.
func TestPackagesAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		documented[s.pkg] = documented[s.pkg] || s.file.Doc != nil
	}
	for pkg, ok := range documented {
		if !ok {
			t.Errorf("package %s has no doc comment", pkg)
		}
	}
}
